"""When a training is going wrong for good: its loss is no number, or far above where it began, and stays there.

The base model's loss is where it begins, so that a loss two nats above it (a perplexity seven times as high) is of a
model that has lost what it could. Single steps have such losses now and then; twenty in a row, on rows in random order,
have not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kaito_flows.containers.tuner.checkpoint import State

__all__ = ["WINDOW", "held_out_fault", "is_suspect", "note_loss", "training_fault"]

WINDOW = 20
"""Steps whose mean loss is compared with that of the first ones."""

MARGIN = 2.0
"""In nats."""


def note_loss(state: State, loss: float) -> None:
    """Add a step's mean loss to those that are compared."""
    if len(state.first_losses) < WINDOW:
        state.first_losses.append(loss)
    state.recent_losses = [*state.recent_losses, loss][-WINDOW:]


def is_suspect(state: State) -> bool:
    """Whether the last step's loss is that of a training that may be diverging: no state to keep."""
    return state.recent_losses[-1] > _mean(state.first_losses) + MARGIN


def training_fault(state: State, *, shuffled: bool) -> str | None:
    """Say what is wrong with the losses of the last steps, if something is.

    Rows in the order in which they were written may get harder by themselves: of them nothing is said.
    """
    if not shuffled or len(state.recent_losses) < WINDOW:
        return None
    first, last = _mean(state.first_losses), _mean(state.recent_losses)
    if last <= first + MARGIN:
        return None
    return f"loss of the last {WINDOW} steps is {last:.2f}, and was {first:.2f} in the first {len(state.first_losses)}"


def held_out_fault(history: Sequence[Mapping[str, Any]], loss: float) -> str | None:
    """Say what is wrong with a loss on held-out data, if something is."""
    if not math.isfinite(loss):
        return f"held-out loss is {loss}"
    base = next((e["loss"] for e in history if e["event"] == "evaluation" and e["step"] == 0), None)
    if base is None or loss <= base + MARGIN:
        return None
    return f"held-out loss is {loss:.2f}, and was {base:.2f} before the first step"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
