"""What a contestant is told: the same for all of them, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["SEED", "Trial"]

SEED = 42


@dataclass(frozen=True, slots=True)
class Trial:
    """One training.

    Args:
        weights: the base model's folder.
        chats: the file of chats.
        folder: where everything is written; nobody wrote there before.
        length: tokens of the longest row; longer chats are cut.
        tokens_a_step: tokens of an optimizer step, nearly.
        micro_tokens: tokens that go through the model at once, nearly.
        mean_length: of the chats, cut at `length`.
        steps: optimizer steps.
        dtype: in what it is computed.
        recompute: activations are computed anew in the backward pass.
        learning_rate: from the first step to the last.
        r: the adapters' rank, and their alpha.
        shuffle: in an order of the contestant's own, else in that of the file as it is packed.
        variant: which way of a contestant that has several.
        attention: TRL's implementation, by transformers' name; empty: the best that is installed.
    """

    weights: Path
    chats: Path
    folder: Path
    length: int
    tokens_a_step: int
    micro_tokens: int
    mean_length: float
    steps: int
    dtype: Literal["bfloat16", "float32"]
    recompute: bool
    learning_rate: float = 2e-4
    r: int = 16
    shuffle: bool = True
    variant: str = ""
    attention: str = ""

    @property
    def rows(self) -> int:
        """Packed rows that go through the model at once."""
        return max(1, self.micro_tokens // self.length)

    @property
    def micro_steps(self) -> int:
        """How often packed rows go through the model for one optimizer step."""
        return max(1, self.tokens_a_step // (self.rows * self.length))

    def write(self) -> Path:
        """Write it into its folder for a contestant to read, and return where."""
        self.folder.mkdir(parents=True)
        path = self.folder / "trial.json"
        path.write_text(json.dumps(asdict(self), default=str))
        return path
