"""Images of plain files: the same bytes give the same digest, and other tools read them."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

import pytest

from kaito_flows.errors import ImageError
from kaito_flows.oci.images import build_image, extract, open_image, read_file, retag
from kaito_flows.oci.layout import Layout


def test_the_same_files_give_the_same_digest_whatever_their_times_and_owners(tmp_path: Path) -> None:
    digests = set()
    for i in range(2):
        file = tmp_path / f"weights{i}"
        file.write_bytes(b"x" * 3_000_001)
        os.utime(file, (i, time.time()))
        file.chmod(0o600 + i)
        layers = [{"data/adapter_model.safetensors": file}, {"data/b": b"2", "data/a": b"1"}]
        digests.add(build_image(Layout(tmp_path / str(i)), layers, annotations={"k": "v"}).digest)
    assert len(digests) == 1


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path / "l"), [{"data/a": b"one"}, {"data/b/c": b"two"}], annotations={})
    extract(image, tmp_path / "out")
    assert (tmp_path / "out/data/a").read_bytes() == b"one"
    assert (tmp_path / "out/data/b/c").read_bytes() == b"two"
    assert read_file(image, "data/b/c") == b"two"


def test_a_layer_is_a_plain_tar_with_nothing_of_the_machine_in_it(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path), [{"data/b": b"2", "data/a": b"1"}], annotations={})
    layer = image.repository.manifest(image.digest)["layers"][0]
    assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
    with tarfile.open(image.repository.blob_path(layer["digest"]), "r:") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["data/a", "data/b"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}


def test_a_reference_by_tag_and_by_digest_open_the_same_image(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path), [{"data/a": b"1"}], annotations={"k": "v"}, tag="one")
    retag(image, "two")
    assert {open_image(f"oci:{tmp_path}:{tag}").digest for tag in ("one", "two")} == {image.digest}
    assert open_image(image.reference).annotations == {"k": "v"}


def test_a_file_that_is_not_in_the_image_is_named(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path), [{"data/a": b"1"}], annotations={})
    with pytest.raises(ImageError, match=r"file-not-in-image: .*no file 'data/z'"):
        read_file(image, "data/z")


def test_a_layer_that_climbs_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l")
    image = build_image(layout, [{"../../outside": b"1"}], annotations={})
    with pytest.raises(ImageError, match="image-damaged"):
        extract(image, tmp_path / "a" / "b")
    assert not (tmp_path / "outside").exists()


def test_a_folder_may_have_an_at_sign_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "jane@corp.example"
    image = build_image(Layout(folder), [{"data/a": b"1"}], annotations={}, tag="latest")
    assert open_image(f"oci:{folder}:latest").digest == open_image(image.reference).digest == image.digest


@pytest.mark.parametrize("reference", ["", "docker.io/a:b", "oci:", "oci:/folder", "oci:/folder@sha256:12"])
def test_what_is_no_image_is_refused(reference: str) -> None:
    with pytest.raises(ImageError, match=r"not an image|no tag and no digest"):
        open_image(reference)


def test_a_layer_that_is_no_tar_is_called_damaged(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    image = build_image(layout, [{"data/a": b"1"}], annotations={})
    layout.blob_path(layout.manifest(image.digest)["layers"][0]["digest"]).write_bytes(b"not a tar" * 100)
    with pytest.raises(ImageError, match="image-damaged"):
        extract(image, tmp_path / "out")
