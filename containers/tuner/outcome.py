"""What a training came to: its evaluations, the best of them, which step's adapter is published, and the facts to tell.

All of it follows from the history, so that a resumed run comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Dataset
from kaito_flows.containers.tuner.job import TrainingArguments

__all__ = ["OUT_OF_MEMORY", "best_step", "evaluation_at", "published_step", "training_facts", "without_gain"]

OUT_OF_MEMORY = "out-of-memory"
"""The event that tells of a portion that did not fit, and of what goes through the device at once from then on."""


def evaluation_at(state: State, step: int) -> dict[str, Any] | None:
    """Return what was measured on held-out data after that step, if it was: loss, perplexity, tokens."""
    for entry in state.history:
        if entry["event"] == "evaluation" and entry["step"] == step:
            return {key: entry[key] for key in ("loss", "perplexity", "tokens")}
    return None


def _of_adapters(history: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations, without that of the base model, which is no adapter."""
    return [entry for entry in history if entry["event"] == "evaluation" and entry["step"] > 0]


def best_step(history: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step with the least held-out loss, the first of several; None before there is an evaluation."""
    best = min(_of_adapters(history), key=lambda entry: entry["loss"], default=None)
    return int(best["step"]) if best else None


def without_gain(history: Iterable[Mapping[str, Any]], threshold: float) -> int:
    """Return how many evaluations it is since one was better than all before it by more than the threshold.

    As transformers counts them (`transformers.EarlyStoppingCallback`).
    """
    least, count = math.inf, 0
    for entry in _of_adapters(history):
        count = 0 if entry["loss"] < least - threshold else count + 1
        least = min(least, entry["loss"])
    return count


def published_step(state: State, arguments: TrainingArguments) -> int:
    """Return after which step the adapter is the one that is published."""
    if not arguments.load_best_model_at_end:
        return state.step
    return best_step(state.history) or state.step


def training_facts(state: State, dataset: Dataset, arguments: TrainingArguments, total: int) -> dict[str, Any]:
    """Return the facts of a finished training: `tokens` read without padding, `trained_tokens` of them learned.

    Of these only what happened, or was asked for: `best_step`, whose adapter is published; `steps_planned`, where the
    training stopped early; `micro_batch_halvings`, how often memory ran out.
    """
    steps_an_epoch = math.ceil(len(dataset.train) / arguments.rows_a_step)
    halvings = sum(entry["event"] == OUT_OF_MEMORY and entry["of"] == "training" for entry in state.history)
    return {
        "steps": state.step,
        "epochs": round(state.step / steps_an_epoch, 4),
        "tokens": state.tokens,
        "trained_tokens": state.targets,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
        **({"best_step": published_step(state, arguments)} if arguments.load_best_model_at_end else {}),
        **({"steps_planned": total} if state.step < total else {}),
        **({"micro_batch_halvings": halvings} if halvings else {}),
    }
