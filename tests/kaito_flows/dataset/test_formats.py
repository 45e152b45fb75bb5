from __future__ import annotations

import gzip
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kaito_flows.dataset.formats import Chat, Columns, read_chats
from kaito_flows.errors import DatasetError

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def jsonl(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def messages_of(chats: list[Chat]) -> list[Any]:
    return [chat.messages for chat in chats]


def refused(source: Any, columns: Columns | None = None) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        read_chats(source, columns or Columns())
    return caught.value


def test_messages_are_read_from_parquet_whatever_the_file_is_called(source: Any) -> None:
    columns = {"id": [1, 2], "messages": [HI, [*HI, *HI]]}
    for name in ("a.parquet", "json.csv", "no-name", "a.jsonl"):
        assert messages_of(read_chats(source(columns, name), Columns())) == [HI, [*HI, *HI]]


def test_extra_fields_of_messages_are_ignored(source: Any) -> None:
    rows = [[{**HI[0], "weight": 1, "tool_calls": None}, {**HI[1], "name": "bot"}]]
    assert messages_of(read_chats(source({"messages": rows}), Columns())) == [HI]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_a_slice_with_lists_of_many_lengths_is_read_right(source: Any, tmp_path: Any, kind: Any) -> None:
    chats = [HI * count for count in range(1, 40)]
    struct = pa.struct([("role", pa.large_string()), ("content", pa.dictionary(pa.int32(), pa.string()))])
    array = pa.array(chats, kind(struct)).slice(5, 30)
    pq.write_table(pa.table({"messages": array}), tmp_path / "t", row_group_size=7)
    assert messages_of(read_chats(source((tmp_path / "t").read_bytes()), Columns())) == chats[5:35]


def test_every_kind_of_file_gives_the_same_chats(source: Any, tmp_path: Any) -> None:
    text = json.dumps(HI)
    with pa.ipc.new_file(
        tmp_path / "arrow",
        pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))]),
    ) as out:
        out.write_table(pa.table({"messages": [HI, HI]}))
    quoted = '"' + text.replace('"', '""') + '"'
    files = [
        {"messages": [HI, HI]},
        {"messages": [text, text]},
        (tmp_path / "arrow").read_bytes(),
        jsonl({"messages": HI}, {"messages": text}),
        b"\xef\xbb\xbf\n" + jsonl({"messages": HI}) + b"\r\n\r\n" + jsonl({"messages": HI, "other": 1}) + b"\n\n",
        json.dumps([{"messages": HI}] * 2, indent=2).encode(),
        f"id,messages\n1,{quoted}\n\n2,{quoted}\n".encode(),
        f"\ufeffmessages\r\n{quoted}\r\n{quoted}\r\n".encode(),
    ]  # fmt: skip
    for number, content in enumerate(files):
        assert messages_of(read_chats(source(content, f"f{number}"), Columns())) == [HI, HI], number


def test_prompts_and_completions_become_turns_of_which_the_completion_is_learned(source: Any) -> None:
    (chat,) = read_chats(source({"prompt": ["Hi"], "completion": ["Hello"]}), Columns())
    assert (chat.messages, chat.learn_from) == (HI, 1)
    past = [*HI, {"role": "user", "content": "More"}]
    answer = [{"role": "assistant", "content": "No"}]
    (chat,) = read_chats(source({"prompt": [past], "completion": [answer]}), Columns())
    assert (chat.messages, chat.learn_from) == ([*past, *answer], 3)


def test_text_that_looks_like_messages_stays_text_in_a_completion(source: Any) -> None:
    answer = '[{"role": "assistant", "content": "as JSON"}]'
    (chat,) = read_chats(source({"prompt": ["Give me JSON"], "completion": [answer]}), Columns())
    assert chat.messages[-1]["content"] == answer


def test_named_columns_are_used(source: Any) -> None:
    data = {"chat": [HI], "Question": ["Hi"], "Answer": ["Hello"], "messages": [None], "completion": ["Hello"]}
    for columns in (
        Columns(messages="chat"),
        Columns(context="Question", response="Answer"),
        Columns(context="Question"),
    ):
        assert messages_of(read_chats(source(data), columns)) == [HI]


def test_what_follows_the_last_answer_is_left_out(source: Any) -> None:
    assert messages_of(read_chats(source({"messages": [[*HI, HI[0]]]}), Columns())) == [HI]


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"text": ["a"], "label": [1]}, Columns(), "found 'text', 'label'"),
        ({"prompt": ["a"], "answer": ["b"]}, Columns(), "found 'prompt', 'answer'"),
        ({"messages": [HI]}, Columns(messages="chats"), "no column 'chats'"),
        ({"context": ["a"], "out": ["b"]}, Columns(context="context", response="response"), "no column 'response'"),
        ({f"c{n}": [n] for n in range(30)}, Columns(), "and 10 more"),
    ],
)
def test_missing_columns_are_named_with_those_that_are_there(
    columns: Any, named: Columns, message: str, source: Any
) -> None:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for content in (columns, jsonl(*rows)):
        error = refused(source(content), named)
        assert error.code == "dataset-columns"
        assert message in error.message
    if named == Columns():
        assert "messages, or prompt and completion" in error.hint


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages is null"),
        ([], "messages is empty"),
        ("Hi", "text, but not JSON"),
        ("{}", "an object, not a list"),
        (5, "a number, not a list"),
        ([None], "messages[0] is null"),
        (["Hi"], "messages[0] is text"),
        ([{"content": "Hi"}], "messages[0] has no role"),
        ([{"role": "user"}, HI[1]], "messages[0] has no content"),
        ([{"role": "user", "content": None}, HI[1]], "messages[0] has no content"),
        ([{"role": "user", "content": 5}, HI[1]], "content that is a number"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]], "content that is a list"),
        ([{"role": "gpt", "content": "Hi"}], "unknown role 'gpt'"),
        ([{"role": ["user"], "content": "Hi"}], "unknown role"),
        ([{"from": "human", "value": "Hi"}], "no role"),
        ([HI[0]], "no assistant turn"),
        ([HI[0], {"role": "assistant", "content": " \n"}], "messages[1] is an empty answer"),
        ([HI[0], {**HI[1], "tool_calls": [{"id": 1}]}], "tool calls"),
        ([HI[0], {"role": "assistant", "content": "\ud83d"}], "surrogate"),
    ],
)
def test_a_row_that_is_not_a_chat_is_named_with_file_and_row(messages: Any, message: str, source: Any) -> None:
    error = refused(source(jsonl({"messages": HI}, {"messages": messages}, {"messages": HI})))
    assert error.code == "dataset-row"
    assert error.place.endswith("data.bin: row 2")
    assert message in error.message


def test_bad_rows_are_counted(source: Any) -> None:
    error = refused(source({"messages": [HI, None, [HI[0]], HI, []]}))
    assert error.place.endswith(": row 2")
    assert "2 more rows" in error.message


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (None, "b", "prompt is null"),
        ("a", None, "completion is null"),
        ("a", "", "empty answer"),
        ("a", [HI[0]], "no assistant turn"),
        (HI, [HI[0]], "no assistant turn"),
    ],
)
def test_a_prompt_or_completion_that_cannot_be_used_is_named(
    prompt: Any, completion: Any, message: str, source: Any
) -> None:
    error = refused(source(jsonl({"prompt": prompt, "completion": completion})))
    assert (error.code, message in error.message) == ("dataset-row", True)


def test_rows_without_a_key_and_rows_that_are_no_objects_are_named(source: Any) -> None:
    assert refused(source(jsonl({"messages": HI}, {"text": "a"}))).message == "messages is null"
    assert "a list, not an object" in refused(source(jsonl({"messages": HI}, [1]))).message
    assert refused(source(b"[1]")).code == "dataset-row"


@pytest.mark.parametrize("content", [{"messages": pa.array([], pa.string())}, b"messages\n", b"[]"])
def test_a_file_without_rows_is_refused(content: Any, source: Any) -> None:
    assert refused(source(content)).code == "dataset-empty"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"PAR1", "dataset-damaged"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "dataset-damaged"),
        (b"ARROW1\0\0nothing", "dataset-damaged"),
        (jsonl({"messages": HI}) + b'\n{"messages": [', "dataset-damaged"),
        (b"[" * 100_000, "dataset-damaged"),
        (b'{"messages":' * 100_000, "dataset-damaged"),
        (b'[{"messages": []}', "dataset-damaged"),
        (b'messages\n"never closed', "dataset-damaged"),
        ("messages\nné".encode("latin-1"), "dataset-damaged"),
        (gzip.compress(b"data"), "dataset-format"),
        (b"PK\x03\x04 zip", "dataset-format"),
        (b"\x89PNG\r\n\x1a\n\0\0", "dataset-format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "dataset-columns"),
    ],
)
def test_files_that_cannot_be_read_are_named(content: bytes, code: str, source: Any) -> None:
    error = refused(source(content, "train.parquet"))
    assert error.code == code
    assert "train.parquet" in error.place
    assert "\n" not in str(error)


def test_a_parquet_file_damaged_anywhere_is_refused_or_still_right(source: Any) -> None:
    chats = [[HI[0], {"role": "assistant", "content": f"answer {n}"}] for n in range(200)]
    whole = source({"messages": chats}).path.read_bytes()
    codes = set()
    dice = random.Random(0)
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(3):
            broken[dice.randrange(4, len(broken))] ^= 1 << dice.randrange(8)
        try:
            read_chats(source(bytes(broken)), Columns())
        except DatasetError as error:
            codes.add(error.code)
    for cut in (100, len(whole) // 2, len(whole) - 1):
        assert refused(source(whole[:cut])).code == "dataset-damaged"
    assert "dataset-damaged" in codes
