"""The name of an image in a folder: `oci:<folder>:<tag>` or `oci:<folder>@<digest>`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kaito_flows.errors import ImageError


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An image in a folder: `oci:<folder>:<tag>` or `oci:<folder>@sha256:<hex>` (skopeo's spelling of the first)."""

    path: Path
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> LayoutReference:
        """Read a layout reference.

        Raises:
            ImageError: it is not one.
        """
        match = re.match(
            r"^oci:(?P<path>.+?)(?<!@sha256)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))$", text
        )
        if not match:
            raise ImageError(f"not a layout reference: {text!r}", hint="write oci:FOLDER:TAG or oci:FOLDER@DIGEST")
        return cls(Path(match["path"]), match["tag"] or "", match["digest"] or "")

    def __str__(self) -> str:
        return f"oci:{self.path}" + (f"@{self.digest}" if self.digest else f":{self.tag}")
