"""Unpacking layers of strangers: whatever they hold, nothing is written or leads outside of the destination."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from kaito_flows.errors import ImageError
from kaito_flows.oci.unpacking import unpack_member

Member = tuple[str, bytes, str]  # name, kind, content or target
FILE, FOLDER, SYMLINK, HARDLINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def unpack(destination: Path, *members: Member) -> None:
    """Unpack members, each a name, a kind, and its content or where it leads."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, kind, text in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == FILE:
                info.size = len(text)
            else:
                info.linkname = text
            tar.addfile(info, io.BytesIO(text.encode()) if kind == FILE else None)
    raw.seek(0)
    destination.mkdir(exist_ok=True)
    with tarfile.open(fileobj=raw) as tar:
        for member in tar:
            unpack_member(tar, member, destination, "image")


def test_files_folders_and_links_inside_are_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(
        root,
        ("/data/a", FILE, "one"),
        ("data/deep", FOLDER, ""),
        ("data/deep/up", SYMLINK, "../a"),
        ("data/same", HARDLINK, "data/a"),
        ("data/a", FILE, "two"),
    )
    assert (root / "data/deep/up").read_text() == "two"
    assert (root / "data/same").read_text() == "one"
    assert (root / "data/a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "members",
    [
        [("../out", FILE, "x")],
        [("a/../../out", FILE, "x")],
        [("link", SYMLINK, "/etc/hostname")],
        [("link", SYMLINK, "../out")],
        [("d", SYMLINK, "."), ("d/d/d/link", SYMLINK, "../../out")],
        # At first `d` is not there, and the steps seem to lead inside; then it is a link, and they would not.
        [("a", SYMLINK, "d/d/d/../../../../etc/hostname"), ("d", SYMLINK, ".")],
        [("link", HARDLINK, "../../etc/hostname")],
        [("pipe", tarfile.FIFOTYPE, "")],
    ],
)
def test_what_would_lead_outside_is_refused(tmp_path: Path, members: list[Member]) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ImageError, match="image-damaged: image"):
        unpack(tmp_path / "root", *members)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_that_replaces_a_folder_takes_what_was_in_it_along(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(root, ("x/y/link", SYMLINK, "../../z"), ("z", FILE, "z"), ("x", SYMLINK, "."))
    assert not (root / "y").exists()
    assert (root / "x").is_symlink()
