"""Layers: a tar with sorted names and nothing of the machine or the hour in it, written and read as a stream.

Ours are uncompressed, so that digest and diff id are one hash; those of others may be gzip or zstd, told by their first
bytes, since media types are not always right.
"""

from __future__ import annotations

import gzip
import importlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from kaito_flows.errors import ImageError
from kaito_flows.oci.repository import CHUNK, Repository

__all__ = ["WHITEOUT", "Content", "Layer", "open_layer"]

Content = Path | bytes
_TAR: tuple[type[Exception], ...] = (tarfile.TarError,)
WHITEOUT = ".wh."
"""A file with this prefix says that a lower layer's file is gone; `.wh..wh..opq`, that all in its folder are."""


class Layer:
    """The bytes of a layer that holds these files (path inside the image -> a file or bytes); can be iterated again."""

    def __init__(self, files: Mapping[str, Content]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[bytes]:
        for name in sorted(self.files):
            content = self.files[name]
            info = tarfile.TarInfo(str(PurePosixPath(name)))
            info.size = content.stat().st_size if isinstance(content, Path) else len(content)
            info.mode = 0o644
            yield info.tobuf(tarfile.PAX_FORMAT)
            with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as source:
                yield from _chunks(source)
            yield b"\0" * (-info.size % tarfile.BLOCKSIZE)
        yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk


@contextmanager
def open_layer(repository: Repository, digest: str) -> Iterator[tarfile.TarFile]:
    """Open a layer as a tar that is read from front to back; at the end its digest has been verified.

    Raises:
        ImageError: (`image-damaged`) it is no tar, or not what its digest says; (`image-compression`) it is zstd, and
            nothing here reads that.
    """
    place = repository.reference(digest)
    with repository.open_blob(digest) as blob:
        plain, errors = _decompressed(cast(io.BufferedReader, blob), place)
        try:
            with tarfile.open(fileobj=plain, mode="r|", bufsize=CHUNK) as tar:
                yield tar
            for stream in (plain, blob):
                while stream.read(CHUNK):
                    pass
        except errors as exc:
            raise ImageError(str(exc), place=place, code="image-damaged") from exc


def _decompressed(blob: io.BufferedReader, place: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """Return the plain stream, and what reading a tar from it raises when something is damaged."""
    match blob.peek(4)[:4]:
        case b"\x28\xb5\x2f\xfd":
            return _zstd(blob, place)
        case head if head[:2] == b"\x1f\x8b":
            return cast(BinaryIO, gzip.GzipFile(fileobj=blob)), (*_TAR, EOFError, zlib.error, gzip.BadGzipFile)
    return blob, _TAR


def _zstd(blob: BinaryIO, place: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError as exc:
        hint = "use Python 3.14 or newer, or push the image with gzip layers"
        raise ImageError("a layer is compressed by zstd", place=place, hint=hint, code="image-compression") from exc
    return cast(BinaryIO, zstd.ZstdFile(blob)), (*_TAR, EOFError, zstd.ZstdError)
