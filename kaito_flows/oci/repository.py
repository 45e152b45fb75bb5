"""What a repository of images can do, wherever it is: a folder (`Layout`) or a registry (`RegistryRepository`).

Blobs and manifests are addressed by digest and never change; tags point at manifests and move.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from kaito_flows.errors import ImageError

__all__ = ["CHUNK", "INDEX_TYPE", "MANIFEST_TYPE", "Descriptor", "Repository", "is_digest", "read_manifest", "verified"]

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What points at a blob: media type, digest (`sha256:<64 hex>`), size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The descriptor as the spec writes it."""
        raw: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**raw, "annotations": self.annotations} if self.annotations else raw


class Repository(Protocol):
    """One repository of images; `reference` below is a tag or a digest.

    Raises:
        ImageError: (`image-not-found`) a tag or digest is not there; (`image-damaged`) bytes are not what their digest
            says, or a manifest is none.
        AccessError: (`pull-refused`, `push-refused`) a registry says no.
        RegistryError: a registry does not answer, after several tries.
        DiskFullError: no space left.
    """

    def put_blob(self, chunks: Iterable[bytes], media_type: str) -> Descriptor:
        """Store the bytes and return their descriptor; `chunks` must give the same bytes each time it is iterated."""
        ...

    def put_manifest(self, manifest: Mapping[str, Any]) -> Descriptor:
        """Store a manifest in canonical JSON and return its descriptor."""
        ...

    def manifest(self, reference: str) -> dict[str, Any]:
        """Return the manifest or the index behind a tag or a digest."""
        ...

    def descriptor(self, reference: str) -> Descriptor:
        """Return the descriptor of the manifest behind a tag or a digest."""
        ...

    def resolve(self, reference: str) -> str:
        """Return the digest behind a tag (or the digest itself), if its manifest is there."""
        ...

    def has(self, reference: str) -> bool:
        """Whether the tag or digest, its config and every layer are there."""
        ...

    def tag(self, tag: str, descriptor: Descriptor) -> None:
        """Let `tag` point at the manifest; whatever it pointed at before keeps its digest."""
        ...

    def untag(self, tag: str) -> None:
        """Drop the tag, if it is there and can be dropped; blobs stay."""
        ...

    def tags(self) -> dict[str, str]:
        """Every tag with its digest."""
        ...

    def open_blob(self, digest: str) -> AbstractContextManager[BinaryIO]:
        """Open a blob for reading; whoever reads it to its end knows that it is what the digest says."""
        ...

    def reference(self, reference: str) -> str:
        """The image with that tag or digest as the text that `open_image` and skopeo take."""
        ...

    def probe_push(self) -> None:
        """Raise now what a push would raise for want of rights, and leave nothing behind."""
        ...


def is_digest(reference: str) -> bool:
    """Whether this is a digest, as opposed to a tag."""
    return re.fullmatch(r"sha256:[0-9a-f]{64}", reference) is not None


def read_manifest(raw: bytes, place: str, digest: str = "") -> dict[str, Any]:
    """Return the manifest or index that these bytes hold.

    Raises:
        ImageError: (`image-damaged`) they have another digest, or are none.
    """
    if digest and f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
        raise ImageError("the manifest is not what its digest says", place=place, code="image-damaged")
    try:
        loaded = json.loads(raw)
    except ValueError as exc:
        raise ImageError("the manifest is not JSON", place=place, code="image-damaged") from exc
    if not isinstance(loaded, dict):
        raise ImageError("the manifest is no JSON object", place=place, code="image-damaged")
    points_at = loaded.get("manifests", [loaded.get("config"), *_list(loaded.get("layers"))])
    if not all(isinstance(d, dict) and is_digest(str(d.get("digest"))) for d in _list(points_at)):
        hint = "only OCI images and Docker images of schema 2 can be read"
        raise ImageError("neither an image manifest nor an index", place=place, hint=hint, code="image-damaged")
    return loaded


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def verified(chunks: Iterator[bytes], digest: str, place: str) -> BinaryIO:
    """Return a stream over the chunks whose last read raises `ImageError` unless they have that digest."""
    return io.BufferedReader(_Verified(chunks, digest, place), CHUNK)


class _Verified(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes], digest: str, place: str) -> None:
        self._chunks, self._digest, self._place = chunks, digest, place
        self._hash, self._left = hashlib.sha256(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                if f"sha256:{self._hash.hexdigest()}" != self._digest:
                    raise ImageError(
                        "the bytes are not what their digest says", place=self._place, code="image-damaged"
                    )
                return 0
            self._hash.update(chunk)
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
