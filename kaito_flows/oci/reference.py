"""The text forms of an image, as skopeo spells them.

    oci:<folder>:<tag>                        oci:<folder>@sha256:<hex>
    docker://<registry>/<repository>:<tag>    docker://<registry>/<repository>@sha256:<hex>

Without the tag or digest they name the repository.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kaito_flows.errors import ImageError
from kaito_flows.reference import Reference

__all__ = ["ImageName"]

_LAYOUT = re.compile(
    r"oci:(?!.*@sha256:(?![0-9a-f]{64}$))(?P<path>.+?)(?<!@sha256)"
    r"(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_HINT = (
    "write oci:FOLDER:TAG, oci:FOLDER@DIGEST, docker://REGISTRY/REPOSITORY:TAG or docker://REGISTRY/REPOSITORY@DIGEST"
)


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image's text in parts: the folder (`oci:`) or the registry and repository (`docker://`), and tag or digest.

    Exactly one of `folder` and `registry` is set; `reference` is a tag, a digest, or empty.
    """

    folder: str = ""
    registry: str = ""
    repository: str = ""
    reference: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Read the text of an image or of a repository.

        Raises:
            ImageError: it is neither.
        """
        if text.startswith("docker://"):
            name = text.removeprefix("docker://")
            parsed = Reference.parse(name)
            tag = parsed.tag if name.endswith(f":{parsed.tag}") else ""
            return cls(registry=parsed.registry, repository=parsed.repository, reference=parsed.digest or tag)
        match = _LAYOUT.fullmatch(text)
        if not match:
            raise ImageError(f"not an image: {text!r}", hint=_HINT)
        return cls(folder=match["path"], reference=match["tag"] or match["digest"] or "")

    @classmethod
    def parse_image(cls, text: str) -> ImageName:
        """Read the text of an image; a tag or a digest is required.

        Raises:
            ImageError: it is not one.
        """
        name = cls.parse(text)
        if not name.reference:
            raise ImageError(f"no tag and no digest: {text!r}", hint=_HINT)
        return name
