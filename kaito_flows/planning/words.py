"""Bytes and seconds as people say them."""

from __future__ import annotations

__all__ = ["duration", "gib"]


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
