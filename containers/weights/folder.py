"""The folder that a model lies in, made so that it is either whole or not there.

`source.json` says that the model is whole, and what it was made from; `tokenizer-source.json` says so of a folder that
holds only what tokenising needs: configuration, tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from kaito_flows.errors import WeightsError, disk_errors

__all__ = ["MARKER", "Parts", "check_files", "is_whole", "link_files", "locked", "new_folder", "write_json"]

Parts = Literal["all", "tokenizer"]
MARKER, TOKENIZER_MARKER = "source.json", "tokenizer-source.json"
_MARKERS: dict[Parts, str] = {"all": MARKER, "tokenizer": TOKENIZER_MARKER}
_PARTIAL = ".weights-"


def is_whole(folder: Path, source: dict[str, Any], parts: Parts = "all") -> bool:
    """Whether `folder` holds finished parts of a model made from exactly that source; a whole one has every part."""
    return _holds(folder, source, "all") or (parts == "tokenizer" and _holds(folder, source, "tokenizer"))


def _holds(folder: Path, source: dict[str, Any], parts: Parts) -> bool:
    try:
        made_from = json.loads((folder / _MARKERS[parts]).read_bytes())
        check_files(folder, parts)
    except (OSError, ValueError, WeightsError):
        return False
    return bool(made_from == source)


def check_files(folder: Path, parts: Parts = "all") -> None:
    """Raise unless the folder holds what tuning and serving need: configuration, tokenizer and, of `all`, safetensors.

    Raises:
        WeightsError: (code `weights-not-safetensors`) weights only as pickles, or none; (code `weights-incomplete`).
    """
    if parts == "all" and not any(path.stat().st_size for path in folder.glob("*.safetensors")):
        raise WeightsError(
            "no safetensors file among the weights; pickles are not read",
            place=str(folder),
            hint="convert the model once: transformers' save_pretrained writes safetensors",
            code="weights-not-safetensors",
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"{name} is missing", place=str(folder), code="weights-incomplete")
    index = folder / "model.safetensors.index.json"
    if parts == "all" and index.is_file():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise WeightsError(f"shard {missing[0]} is missing", place=str(folder), code="weights-incomplete")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock beside `folder`, so that two jobs with one root build it once; clear what killed jobs left.

    In a volume mounted at `folder` the lock lies inside: what is around it may be read-only.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if folder.is_mount() else folder.parent
        with (beside / f"{_PARTIAL}lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for place in (folder.parent, folder):
                for left in place.glob(f"{_PARTIAL}*/"):
                    shutil.rmtree(left)
            yield


@contextlib.contextmanager
def new_folder(folder: Path, source: dict[str, Any], parts: Parts = "all") -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, it is checked, marked with its source, and becomes `folder`.

    Raises:
        WeightsError: what was put into it is not a model.
        DiskFullError: no space left.
    """
    # A volume mounted at `folder` cannot be renamed: there the files move in one by one, the marker last.
    mounted = folder.is_mount()
    place = folder if mounted else folder.parent
    with disk_errors(folder):
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=place))
        try:
            yield partial
            check_files(partial, parts)
            write_json(partial / _MARKERS[parts], source)
            partial.chmod(0o755)
            if mounted:
                _move_in(partial, folder)
            else:
                _replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs: two spaces, keys in the order given."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        _sync(path)
    _sync(partial)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
        folder.rename(old / "old")
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    _sync(folder.parent)


def link_files(made: Path, folder: Path) -> None:
    """Let `folder` be the model in `made`: a link to it or, where a volume is mounted, links to its files."""
    with disk_errors(folder):
        if not folder.is_mount():
            folder.parent.mkdir(parents=True, exist_ok=True)
            link = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent)) / "link"
            link.symlink_to(made)
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            link.replace(folder)
            link.parent.rmdir()
            return
        for path in folder.iterdir():
            if path.is_symlink():
                path.unlink()
        for path in made.iterdir():
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)


def _move_in(partial: Path, folder: Path) -> None:
    for marker in _MARKERS.values():
        (folder / marker).unlink(missing_ok=True)
    names = {path.name for path in partial.iterdir()}
    for path in folder.iterdir():
        if path.is_file() and path.name not in names and path.suffix in {".json", ".safetensors", ".jinja"}:
            path.unlink()
    for name in sorted(names, key=lambda name: name in _MARKERS.values()):
        _sync(partial / name)
        (partial / name).rename(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
