"""Images that others made: compressed, layered over a system, in an index, or made to do harm."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.errors import ImageError
from kaito_flows.oci.images import Image, extract, find_image, read_file
from kaito_flows.oci.layout import Layout
from kaito_flows.oci.repository import INDEX_TYPE, Descriptor

DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def tar(*members: tuple[str, bytes | str | int]) -> bytes:
    """A tar of files (bytes), symbolic links (a text) and devices or the like (a type's number as text in bytes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type = tarfile.SYMTYPE if isinstance(content, str) else tarfile.CHRTYPE
                info.linkname = content if isinstance(content, str) else ""
                archive.addfile(info)
    return out.getvalue()


def put(layout: Layout, *layers: bytes, config: bytes = b"{}", **more: Any) -> Descriptor:
    descriptors = [layout.put_blob([layer], DOCKER_LAYER).as_dict() for layer in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": layout.put_blob([config], "application/vnd.docker.container.image.v1+json").as_dict(),
        "layers": descriptors,
    }
    return layout.put_manifest(manifest | more)


def image(layout: Layout, *layers: bytes) -> Image:
    return find_image(layout, put(layout, *layers).digest)


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzip", "plain, whatever the media type says"])
def test_kaitos_adapters_are_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    # As its pusher makes them: one layer, a config without os and architecture.
    made = image(Layout(tmp_path / "l"), pack(tar(("data/adapter_config.json", b"{}"), ("data/a", b"1" * 2_000_000))))
    assert read_file(made, "data/adapter_config.json") == b"{}"
    extract(made, tmp_path / "out")
    assert (tmp_path / "out/data/a").stat().st_size == 2_000_000


def test_zstd_is_read_where_python_can_and_named_where_it_cannot(tmp_path: Path) -> None:
    if sys.version_info >= (3, 14):
        zstd = importlib.import_module("compression.zstd")
        assert read_file(image(Layout(tmp_path / "l"), zstd.compress(tar(("data/a", b"1")))), "data/a") == b"1"
    else:
        made = image(Layout(tmp_path / "l"), b"\x28\xb5\x2f\xfd and so on")
        with pytest.raises(ImageError, match=r"image-compression: .*zstd.*Python 3\.14"):
            read_file(made, "data/a")


def test_a_folder_is_taken_out_of_a_whole_system(tmp_path: Path) -> None:
    system = tar(("etc/mtab", "/proc/mounts"), ("dev/null", 3), ("bin/sh", b"#"), ("database", b"no"))
    made = image(
        Layout(tmp_path / "l"), gzip.compress(system), tar(("./data/train.parquet", b"rows"), ("/data/b", b"2"))
    )
    extract(made, tmp_path / "out", only="data")
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")} == {
        "data", "data/train.parquet", "data/b"
    }  # fmt: skip
    assert read_file(made, "data/train.parquet") == b"rows"
    assert read_file(made, "data/b") == b"2"


def test_a_later_layer_replaces_and_removes(tmp_path: Path) -> None:
    made = image(
        Layout(tmp_path / "l"),
        tar(("data/a", b"old"), ("data/b", b"gone"), ("data/c/d", b"gone"), ("data/c/e", b"gone")),
        tar(("data/a", b"new"), ("data/.wh.b", b""), ("data/c/.wh..wh..opq", b""), ("data/c/f", b"kept")),
    )
    extract(made, tmp_path / "out")
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in tmp_path.glob("out/**/*") if p.is_file()
    }
    assert found == {"data/a": b"new", "data/c/f": b"kept"}
    assert read_file(made, "data/a") == b"new"
    for gone in ("data/b", "data/c/d", "data/c/e"):
        with pytest.raises(ImageError, match="file-not-in-image"):
            read_file(made, gone)


HARM: dict[str, list[tuple[str, Any]]] = {
    "climbs out": [("../../outside", b"1")],
    "climbs out of the folder": [("data/../../outside", b"1")],
    "writes through a link": [("data/link", "../.."), ("data/link/outside", b"1")],
    "links out": [("data/link", "../../outside")],
    "links to the root": [("data/link", "/etc/passwd")],
    "is a device": [("data/null", 3)],
}


@pytest.mark.parametrize("only", ["", "data"])
@pytest.mark.parametrize("members", HARM.values(), ids=HARM)
def test_a_layer_that_would_do_harm_is_refused(tmp_path: Path, members: list[tuple[str, Any]], only: str) -> None:
    made = image(Layout(tmp_path / "l"), tar(*members))
    if only and not members[0][0].startswith("data/"):
        extract(made, tmp_path / "a/out", only=only)
        assert not list((tmp_path / "a/out").iterdir())
    else:
        with pytest.raises(ImageError, match="image-damaged"):
            extract(made, tmp_path / "a/out", only=only)
    assert {p.name for p in tmp_path.iterdir()} <= {"l", "a"}
    assert not (tmp_path / "a/outside").exists()


def test_a_layer_that_removes_removes_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("here")
    (tmp_path / "out").mkdir()
    for name in ("../.wh.victim", "data/../../.wh.victim", ".wh.."):
        extract(image(Layout(tmp_path / "l"), tar((name, b""))), tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "here"
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: raw[:40] + b"x" * 20 + raw[60:]], ids=["cut", "bad"]
)
def test_a_gzip_that_is_damaged_is_told(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    made = image(Layout(tmp_path / "l"), damage(gzip.compress(tar(("data/a", hashlib.sha256(b"x").digest() * 9)))))
    with pytest.raises(ImageError, match="image-damaged"):
        extract(made, tmp_path / "out")


def index(layout: Layout, *entries: tuple[str, Descriptor]) -> str:
    manifests = []
    for platform, descriptor in entries:
        system, _, architecture = platform.partition("/")
        extra = {"platform": {"os": system, "architecture": architecture}} if platform else {}
        manifests.append({**descriptor.as_dict(), **extra})
    return layout.put_manifest({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}).digest


def test_out_of_an_index_comes_the_image_for_this_platform_or_the_only_one(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    arm, amd, proof = (put(layout, tar(("data/a", text))) for text in (b"arm", b"amd", b"attestation"))
    assert find_image(layout, index(layout, ("linux/arm64", arm), ("linux/amd64", amd))).digest == amd.digest
    assert find_image(layout, index(layout, ("linux/arm64", arm), ("unknown/unknown", proof))).digest == arm.digest
    assert find_image(layout, index(layout, ("", arm))).digest == arm.digest
    with pytest.raises(ImageError, match=r"image-platform: .*linux/arm64, windows/amd64"):
        find_image(layout, index(layout, ("linux/arm64", arm), ("windows/amd64", amd)))
    with pytest.raises(ImageError, match="image-platform"):
        find_image(layout, index(layout))


def test_an_index_is_had_when_all_its_images_are(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    image = put(layout, tar(("data/a", b"1")))
    digest = index(layout, ("linux/amd64", image))
    assert layout.has(digest)
    layout.blob_path(image.digest).unlink()
    assert not layout.has(digest)
