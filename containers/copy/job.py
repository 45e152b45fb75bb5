"""What the copy program's job file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kaito_flows.errors import InputError
from kaito_flows.oci.reference import ImageName
from kaito_flows.oci.repository import is_digest

__all__ = ["CopyJob"]


@dataclass(frozen=True, slots=True)
class CopyJob:
    """The job file: one of `source` and `target` is an image's text, the other a folder below `root`.

    Raises:
        InputError: a value that cannot be used, with its key.
    """

    version: Literal[1]
    workspace: str
    root: Path
    source: str
    target: str

    def __post_init__(self) -> None:
        if not self.root.is_absolute():
            raise InputError(f"{str(self.root)!r} is not an absolute path", place="root", code="invalid-job")
        if _is_image(self.source) == _is_image(self.target):
            hint = "write one of them as an image, and the other as a folder"
            raise InputError("an image goes into a folder, or a folder into one", hint=hint, code="invalid-job")
        for key in ("source", "target"):
            value = getattr(self, key)
            if not _is_image(value) and (not Path(value).is_absolute() or ".." in Path(value).parts):
                raise InputError(f"{value!r} is not an absolute path", place=key, code="invalid-job")
        if self.packs and is_digest(ImageName.parse_image(self.target).reference):
            raise InputError("a tag is needed: the digest comes of the files", place="target", code="invalid-job")

    @property
    def packs(self) -> bool:
        """Whether a folder becomes an image; else an image is unpacked."""
        return _is_image(self.target)

    @property
    def image(self) -> str:
        """The image's text."""
        return self.target if self.packs else self.source

    @property
    def folder(self) -> Path:
        """The folder, where it lies on this machine."""
        return self.root / Path(self.source if self.packs else self.target).relative_to("/")


def _is_image(text: str) -> bool:
    return text.startswith(("oci:", "docker://"))
