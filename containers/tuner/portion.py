"""What goes through the device at once, and less of it when memory runs out.

    2 rows ─► 1 row ─► half of a row's documents ─► a quarter of them ─► ...

A step's gradients, and an evaluation's loss, are sums over documents, so that portions change the rounding and nothing
else: each optimizer step sees the tokens that it would have seen. With dropout the masks are others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Portion", "ShortOfMemory", "fitting"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Portion:
    """So many whole rows; or, if it is one row, one of so many parts of its documents."""

    rows: int
    parts: int = 1

    def halved(self) -> Portion:
        """Return half of it."""
        return Portion(self.rows // 2) if self.rows > 1 else Portion(1, 2 * self.parts)

    def __str__(self) -> str:
        if self.parts > 1:
            return f"1/{self.parts} of a row"
        return "1 row" if self.rows == 1 else f"{self.rows} rows"


class ShortOfMemory(RuntimeError):
    """A portion did not fit, here or in another process; every process knows."""

    def __init__(self, said: str = "out of memory in another process") -> None:
        super().__init__(said)


def fitting(
    attempt: Callable[[Portion], T],
    portion: Portion,
    most_documents: int,
    on_halved: Callable[[Portion], None],
    spare: Callable[[], bool] = lambda: False,
) -> tuple[T, Portion]:
    """Do what is to be done with that portion, or with half of it until it fits; return the result and the portion.

    Args:
        attempt: does it, from its beginning each time; it raises `ShortOfMemory` in all processes or in none.
        portion: what is tried first.
        most_documents: in one row; a document is not divided.
        on_halved: hears of each portion that is tried instead.
        spare: lets the same portion take less, if it can, and says whether it could; that is tried first.

    Raises:
        ShortOfMemory: a single document does not fit.
    """
    while True:
        try:
            return attempt(portion), portion
        except ShortOfMemory:
            spared = spare()
            if not spared and portion.parts >= most_documents:
                raise
        # Only now nothing refers to what the attempt left on the device.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not spared:
            portion = portion.halved()
            on_halved(portion)
