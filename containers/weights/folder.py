"""The folder that a model lies in, made so that it is either whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kaito_flows.errors import WeightsError, disk_errors

__all__ = ["MARKER", "check_files", "is_whole", "locked", "new_folder", "write_json"]

MARKER = "source.json"
_PARTIAL = ".weights-"


def is_whole(folder: Path, source: dict[str, Any]) -> bool:
    """Whether `folder` holds a finished model made from exactly that source."""
    try:
        made_from = json.loads((folder / MARKER).read_bytes())
        check_files(folder)
    except (OSError, ValueError, WeightsError):
        return False
    return bool(made_from == source)


def check_files(folder: Path) -> None:
    """Raise unless the folder holds what tuning and serving need: configuration, safetensors and tokenizer.

    Raises:
        WeightsError: (code `weights-not-safetensors`) weights only as pickles, or none; (code `weights-incomplete`).
    """
    if not any(path.stat().st_size for path in folder.glob("*.safetensors")):
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
    if index.is_file():
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise WeightsError(f"shard {missing[0]} is missing", place=str(folder), code="weights-incomplete")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock beside `folder`, so that two jobs with one root build it once; clear what killed jobs left."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{_PARTIAL}lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for place in (folder.parent, folder):
                for left in place.glob(f"{_PARTIAL}*/"):
                    shutil.rmtree(left)
            yield


@contextlib.contextmanager
def new_folder(folder: Path, source: dict[str, Any]) -> Iterator[Path]:
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
            check_files(partial)
            write_json(partial / MARKER, source)
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


def _move_in(partial: Path, folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
    names = {path.name for path in partial.iterdir()}
    for path in folder.iterdir():
        if path.is_file() and path.name not in names and path.suffix in {".json", ".safetensors", ".jinja"}:
            path.unlink()
    for name in sorted(names, key=lambda name: name == MARKER):
        _sync(partial / name)
        (partial / name).rename(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
