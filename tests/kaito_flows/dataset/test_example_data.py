"""The data in examples/data is what its README and its script say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kaito_flows.dataset import fetch
from kaito_flows.dataset.formats import Columns, read_chats

DATA = Path(__file__).parents[3] / "examples" / "data"
WORDNET = Path("/usr/share/wordnet")


def test_the_example_is_made_of_definitions() -> None:
    (source,) = fetch([(DATA / "wordnet-definitions.parquet").as_uri()], DATA, allow_files=True)
    chats = read_chats(source, Columns())
    assert len(chats) == 900
    assert source.bytes < 100_000
    assert {tuple(m["role"] for m in chat.messages) for chat in chats} == {("system", "user", "assistant")}
    assert {chat.messages[0]["content"] for chat in chats} == {"You are a dictionary."}
    assert all(20 <= len(chat.messages[2]["content"]) <= 90 for chat in chats)
    assert len({chat.messages[1]["content"] for chat in chats}) == 900


def test_its_licence_lies_beside_it() -> None:
    licence = (DATA / "LICENSE.wordnet").read_text()
    assert "Permission to use, copy, modify and distribute" in licence
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence


@pytest.mark.skipif(not (WORDNET / "index.noun").is_file(), reason="needs Debian's wordnet-base")
def test_the_script_makes_the_same_rows_again() -> None:
    spec = importlib.util.spec_from_file_location("make_wordnet", DATA / "make_wordnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.chats(WORDNET) == pq.read_table(DATA / "wordnet-definitions.parquet")["messages"].to_pylist()
