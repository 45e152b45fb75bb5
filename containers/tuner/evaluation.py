"""The loss on held-out data. Measuring it changes nothing of the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kaito_flows.containers.tuner.data import Split
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean loss over a split's targets in nats, its exponential, and how many targets there are."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(adapted: Adapted, split: Split, batch_size: int, *, stop: Callable[[], bool]) -> Evaluation | None:
    """Measure the loss over every target of the split; None when `stop` said so in between."""
    adapted.peft.eval()
    try:
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for batch in split.batches(torch.arange(len(split)), batch_size, adapted.device):
            if stop():
                return None
            total += loss_sum(adapted.model, batch, masked=adapted.masked).double().cpu()
            targets += batch.targets
    finally:
        adapted.peft.train()
    loss = float(total) / targets
    # exp overflows a float above 709.
    return Evaluation(loss, math.exp(min(loss, 700.0)), targets)
