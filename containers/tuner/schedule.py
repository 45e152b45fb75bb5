"""The learning rate of each step, as transformers' schedules of the same names have it (`transformers.optimization`).

A function of the step alone: there is no state to save.
"""

from __future__ import annotations

import math

from kaito_flows.containers.tuner.job import TrainingArguments

__all__ = ["learning_rate", "steps_in_all"]


def steps_in_all(arguments: TrainingArguments, steps_an_epoch: int) -> int:
    """Return how many optimizer steps the training has."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return max(1, math.ceil(arguments.num_train_epochs * steps_an_epoch))


def learning_rate(arguments: TrainingArguments, step: int, total: int) -> float:
    """Return the learning rate of step number `step` (from 0) of `total`."""
    warmup = arguments.warmup_steps or math.ceil(total * arguments.warmup_ratio)
    kind = arguments.lr_scheduler_type
    if kind == "constant":
        factor = 1.0
    elif step < warmup:
        factor = step / warmup
    elif kind == "constant_with_warmup":
        factor = 1.0
    elif kind == "linear":
        factor = max(0.0, (total - step) / max(1, total - warmup))
    else:
        factor = max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))
    return arguments.learning_rate * factor
