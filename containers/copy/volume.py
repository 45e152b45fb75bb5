"""A volume's files: which of them there are, and how an image's get there.

Volumes bring things that are no data: what the kubelet and file systems keep there is left out. Links to files inside
the volume count as those files; whatever else is neither file nor folder cannot be in an image.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from kaito_flows.errors import DiskFullError, ImageError, InputError, disk_errors
from kaito_flows.oci.images import Image, extract

__all__ = ["files_of", "split", "unpack"]

MARKER, PARTIAL = ".kaito-flows-image", ".kaito-flows-partial"
_NOT_DATA = (MARKER, PARTIAL, "lost+found")
LAYER_BYTES = 1 << 29
"""A layer that breaks on its way is sent again as a whole: none is much larger than this, unless one file is."""


def files_of(folder: Path) -> dict[str, Path]:
    """Return the volume's files: path inside the volume -> file.

    Raises:
        InputError: (`volume-missing`) no such folder; (`volume-empty`) no file in it; (`volume-unreadable`);
            (`volume-link`) a link that leads out, nowhere or to a folder; (`volume-file`) a socket or the like.
    """
    if not folder.is_dir():
        raise InputError("no such folder", place=str(folder), hint="is the volume mounted?", code="volume-missing")
    root = folder.resolve()
    try:
        files = {str(path.relative_to(folder)): _checked(path, root) for path in _walk(folder)}
    except OSError as exc:
        raise _unreadable(exc, folder) from exc
    if not files:
        raise InputError("no file in the volume", place=str(folder), code="volume-empty")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    def fail(exc: OSError) -> None:
        raise exc

    for parent, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        # The kubelet keeps a ConfigMap's or Secret's files under names that begin with two dots.
        folders[:] = [n for n in folders if not (n.startswith("..") or (n in _NOT_DATA and Path(parent) == folder))]
        for name in sorted([*names, *links]):
            if not name.startswith("..") and not (name in _NOT_DATA and Path(parent) == folder):
                yield Path(parent, name)


def _checked(path: Path, root: Path) -> Path:
    place = str(path)
    if path.is_symlink():
        target = Path(os.path.realpath(path))  # a link to itself is no error to it
        if not (target.is_relative_to(root) and target.is_file()):
            message = f"a link to {str(path.readlink())!r}"
            hint = "only links to files inside the volume can be followed"
            raise InputError(message, place=place, hint=hint, code="volume-link")
        path = target
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError("neither a file nor a folder", place=place, code="volume-file")
    with path.open("rb"):  # before anything is sent
        return path


def _unreadable(exc: OSError, folder: Path) -> InputError:
    hint = "let the pod's user or group read it (securityContext.fsGroup)"
    place = str(exc.filename or folder)
    return InputError(f"cannot be read: {exc.strerror}", place=place, hint=hint, code="volume-unreadable")


def split(files: Mapping[str, Path]) -> list[dict[str, Path]]:
    """Return the files in layers, in the order of their names: the same files always in the same layers."""
    layers: list[dict[str, Path]] = []
    room = 0
    for name in sorted(files):
        if room <= 0:
            layers.append({})
            room = LAYER_BYTES
        layers[-1][f"data/{name}"] = files[name]
        room -= files[name].stat().st_size
    return layers


def unpack(image: Image, folder: Path) -> bool:
    """Bring the image's `data/` into the volume, and return whether that had to be done; other files stay.

    Raises:
        ImageError: (`file-not-in-image`) it has no `data/`; (`image-damaged`).
        DiskFullError: no space left, or not enough for the image.
        InputError: (`volume-unwritable`).
    """
    marker, partial = folder / MARKER, folder / PARTIAL
    if marker.is_file() and marker.read_text(encoding="utf-8") == image.digest:
        return False
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            _check_room(image, folder)
            try:
                extract(image, partial, only="data")
                if not (partial / "data").is_dir():
                    raise ImageError("no folder data/ in the image", place=image.reference, code="file-not-in-image")
                marker.unlink(missing_ok=True)
                _move(partial / "data", folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            marker.write_text(image.digest, encoding="utf-8")
    except OSError as exc:
        hint = "let the pod's user or group write to it (securityContext.fsGroup)"
        place = str(exc.filename or folder)
        raise InputError(
            f"cannot be written: {exc.strerror}", place=place, hint=hint, code="volume-unwritable"
        ) from exc
    return True


def _check_room(image: Image, folder: Path) -> None:
    # Compressed layers need more than this; what is too much at any rate is told before it is fetched.
    needed = sum(int(layer.get("size", 0)) for layer in image.repository.manifest(image.digest)["layers"])
    if (free := shutil.disk_usage(folder).free) < needed:
        message = f"{free / 1e9:.1f} GB free, and the image has {needed / 1e9:.1f} GB"
        raise DiskFullError(message, place=str(folder), hint="ask for a larger volume")


def _move(source: Path, folder: Path) -> None:
    """Rename every file into its place; folders that are there are filled."""
    for parent, _, names in os.walk(source):
        here = folder / Path(parent).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for name in names:
            Path(parent, name).replace(here / name)
