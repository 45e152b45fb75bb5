"""Kopf, imported without the Kubernetes clients.

It imports every client that is installed, to know their classes; each takes 35 MB, which a service that runs for months
would hold for nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["kopf"]


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let these modules, unless they are loaded already, not be found inside the block."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None says: there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _hidden("kubernetes", "kubernetes_asyncio"):
    import kopf
