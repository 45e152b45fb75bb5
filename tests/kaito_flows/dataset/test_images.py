"""Datasets out of images: the files below /data, by their paths, whatever else the image holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kaito_flows.dataset import files_of_image
from kaito_flows.errors import DatasetError
from kaito_flows.oci.images import build_image
from kaito_flows.oci.layout import Layout

CHAT = json.dumps({"messages": []}).encode()


def test_every_data_file_is_found_by_its_path_and_nothing_else(tmp_path: Path) -> None:
    files = {
        "data/b.jsonl": CHAT,
        "data/more/a.parquet": b"x",
        "data/README.md": b"#",
        "data/.hidden": b"",
        "c.csv": b"",
    }
    image = build_image(Layout(tmp_path / "layout"), [files], annotations={})
    found = files_of_image(image, tmp_path / "cache")
    assert [file.url for file in found] == ["data/b.jsonl", "data/more/a.parquet"]
    assert found[0].path.read_bytes() == CHAT
    assert found[0].bytes == len(CHAT)
    assert files_of_image(image, tmp_path / "cache") == found, "unpacked once, found again"


def test_the_same_files_in_another_image_are_the_same_dataset(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    one = build_image(layout, [{"data/a.jsonl": CHAT}], annotations={"made": "here"})
    other = build_image(layout, [{"data/a.jsonl": CHAT}, {"etc/os-release": b"x"}], annotations={})
    assert one.digest != other.digest
    facts = [[(f.url, f.sha256) for f in files_of_image(image, tmp_path / "cache")] for image in (one, other)]
    assert facts[0] == facts[1]


def test_an_image_without_data_is_told_with_what_belongs_into_it(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path / "layout"), [{"data/README.md": b"#", "a.jsonl": CHAT}], annotations={})
    with pytest.raises(DatasetError, match=r"dataset-empty: .*no data below /data \(put files that end in \.parquet"):
        files_of_image(image, tmp_path / "cache")
