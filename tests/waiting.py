"""Waiting in tests for what happens elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def eventually(look: Callable[[], Found], seconds: float = 60.0, every: float = 0.5) -> Found:
    """Look until something is found, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {found!r}"
        time.sleep(every)
    return found
