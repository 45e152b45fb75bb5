"""Unpacking a layer: plain files, folders and links, and nothing outside of the destination.

`tarfile` has such a filter itself from Python 3.11.4 on; Debian 12 has an older one.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from kaito_flows.errors import ImageError

__all__ = ["unpack_member"]

EXECUTABLE, PLAIN = 0o755, 0o644


def unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, destination: Path, place: str) -> None:
    """Write one member below `destination`; what lay in its place is replaced, owners and times are not taken over.

    Raises:
        ImageError: (`image-damaged`) it would lie outside, lead outside, or is neither file, folder nor link.
    """
    target = _inside(destination, member.name, place)
    if member.isdir():
        if not target.is_dir() or target.is_symlink():
            target.unlink(missing_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if member.issym():
        _check_link(destination, target, member.linkname, place)
        target.symlink_to(member.linkname)
    elif member.islnk():
        source = _inside(destination, member.linkname, place)
        if not source.is_file():
            raise _damaged(f"{member.name} is a link to {member.linkname}, which is not there", place)
        os.link(source, target, follow_symlinks=False)
    elif member.isfile():
        content = tar.extractfile(member)
        assert content is not None  # it is a file
        with content, target.open("xb") as out:
            shutil.copyfileobj(content, out, 1 << 20)
        target.chmod(EXECUTABLE if member.mode & 0o100 else PLAIN)
    else:
        raise _damaged(f"{member.name} is neither file, folder nor link", place)


def _inside(destination: Path, name: str, place: str) -> Path:
    """The path that a name stands for, in a folder without links, and inside."""
    root = destination.resolve()
    # An absolute name is meant from the image's root, as layers have it.
    path = root / name.lstrip("/")
    parent = path.parent.resolve()
    if path.name == ".." or not parent.is_relative_to(root):
        raise _damaged(f"{name} leads outside of the image's folder", place)
    return parent / path.name


def _check_link(destination: Path, target: Path, link: str, place: str) -> None:
    """Raise unless the link leads inside, whatever else becomes a link later.

    Its steps upwards come first, so that they start from the folder it lies in, and not from where another link leads.
    """
    parts = PurePosixPath(link).parts
    upwards = sum(part == ".." for part in parts)
    leads_to = Path(os.path.normpath(target.parent / link))
    first = parts[:upwards] == ("..",) * upwards
    if not first or PurePosixPath(link).is_absolute() or not leads_to.is_relative_to(destination.resolve()):
        raise _damaged(f"the link {target.name} leads to {link}, outside of the image's folder", place)


def _damaged(message: str, place: str) -> ImageError:
    return ImageError(message, place=place, code="image-damaged")
