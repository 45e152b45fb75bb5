"""Image references as a Workspace writes them: `registry/repository:tag`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kaito_flows.errors import ImageError

_NAME = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*"
_DOMAIN = rf"(?:{_NAME}|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?P<registry>{_DOMAIN})/)?(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[\w][\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
PATTERN = re.sub(r"\(\?P<\w+>", "(?:", _REFERENCE.pattern)
"""A reference, as a pattern that every dialect of regular expressions knows."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An image reference as Docker reads it: registry, repository, and a tag or a digest.

    The grammar is that of `distribution/reference`; a first part without a dot or a port that is not `localhost` is no
    registry but part of the repository on `docker.io`.
    """

    registry: str
    repository: str
    tag: str
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; the registry defaults to `docker.io`, the tag to `latest`.

        Raises:
            ImageError: it is not one.
        """
        match = _REFERENCE.fullmatch(text)
        registry, repository = (match["registry"] or "", match["repository"]) if match else ("", "")
        if registry and not ("." in registry or ":" in registry or registry == "localhost"):
            match = re.fullmatch(_COMPONENT, registry) and match
            registry, repository = "", f"{registry}/{repository}"
        if not match:
            hint = "the repository must be lowercase" if text.lower() != text else "write REGISTRY/REPOSITORY:TAG"
            raise ImageError(f"not an image reference: {text!r}", hint=hint)
        if not registry:
            registry, repository = "docker.io", repository if "/" in repository else f"library/{repository}"
        return cls(registry, repository, match["tag"] or "latest", match["digest"] or "")

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}" + (f"@{self.digest}" if self.digest else "")
