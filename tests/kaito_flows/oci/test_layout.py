"""An OCI layout: what is put in comes out, whole, by tag and by digest."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from kaito_flows.errors import DiskFullError, ImageError
from kaito_flows.oci.images import build_image, open_image
from kaito_flows.oci.layout import Layout


def _tag_many(root: Path, start: int) -> None:
    for i in range(start, start + 20):
        build_image(Layout(root), [{"data/a": str(i).encode()}], annotations={}, tag=f"t{i}")


def test_a_blob_is_found_under_its_hash(tmp_path: Path) -> None:
    descriptor = Layout(tmp_path).put_blob([b"ab", b"c"], "text/plain")
    assert descriptor.digest == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert descriptor.size == 3
    assert Layout(tmp_path).blob_path(descriptor.digest).read_bytes() == b"abc"


def test_a_failed_write_leaves_no_blob_and_no_partial_file(tmp_path: Path) -> None:
    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match="disk-full"):
        Layout(tmp_path).put_blob(chunks(), "text/plain")
    assert list((tmp_path / "blobs" / "sha256").iterdir()) == []


def test_the_folder_is_what_the_image_spec_says(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path), [{"data/a": b"1"}], annotations={"k": "v"}, tag="latest")
    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["schemaVersion"] == 2
    [entry] = index["manifests"]
    assert entry["digest"] == image.digest
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "latest"
    assert entry["size"] == Layout(tmp_path).blob_path(image.digest).stat().st_size


def test_a_tag_moves_and_the_old_digest_stays(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = build_image(layout, [{"data/a": b"1"}], annotations={}, tag="latest")
    second = build_image(layout, [{"data/a": b"2"}], annotations={}, tag="latest")
    assert first.digest != second.digest
    assert layout.tags() == {"latest": second.digest}
    assert layout.has(first.digest)
    layout.untag("latest")
    assert layout.tags() == {}


def test_two_processes_that_tag_at_once_lose_no_tag(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_tag_many, args=(tmp_path, start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(Layout(tmp_path).tags()) == 40


@pytest.mark.parametrize("reference", ["absent", "sha256:" + "0" * 64])
def test_what_is_not_there_is_not_found(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ImageError, match="image-not-found"):
        Layout(tmp_path).resolve(reference)
    assert not Layout(tmp_path).has(reference)


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "md5:" + "0" * 64, "sha256:" + "G" * 64])
def test_a_digest_that_is_none_names_no_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ImageError, match="not a sha256 digest"):
        Layout(tmp_path).blob_path(digest)


def test_an_image_with_a_missing_layer_is_not_had(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    image = build_image(layout, [{"data/a": b"1"}], annotations={}, tag="latest")
    layout.blob_path(layout.manifest("latest")["layers"][0]["digest"]).unlink()
    assert not layout.has("latest")
    assert open_image(f"oci:{tmp_path}:latest").digest == image.digest
