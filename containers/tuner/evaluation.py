"""The loss on held-out data. Measuring it changes nothing of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kaito_flows.containers.tuner.data import Batch, Split
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.world import ALONE, World

__all__ = ["Evaluation", "batches_of", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean loss over a split's targets in nats, its exponential, and how many targets there are."""

    loss: float
    perplexity: float
    tokens: int


def batches_of(adapted: Adapted, split: Split, rows: torch.Tensor, size: int, world: World) -> Iterator[Batch]:
    """Yield this process's share of the rows, `size` at a time.

    Processes that hold the base model together go through it together: each yields as many batches as the others.
    """
    rounds = -(-world.largest_share(len(rows)) // size) if adapted.sharded else 0
    return split.batches(world.share(rows), size, adapted.device, at_least=rounds)


@torch.no_grad()
def evaluate(
    adapted: Adapted, split: Split, batch_size: int, *, stop: Callable[[], bool], world: World = ALONE
) -> Evaluation | None:
    """Measure the loss over every target of the split, in all processes; None when `stop` said so in one of them."""
    adapted.peft.eval()
    stopped = False
    try:
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for batch in batches_of(adapted, split, torch.arange(len(split)), batch_size, world):
            # Who goes through the model together stops together, at the end.
            stopped = stopped or stop()
            if stopped and not adapted.sharded:
                break
            total += loss_sum(adapted.model, batch, masked=adapted.masked).double().cpu()
            targets += batch.targets
    finally:
        adapted.peft.train()
    summed, counted, stops = world.totals(float(total), targets, stopped)
    if stops:
        return None
    loss = summed / counted
    # exp overflows a float above 709.
    return Evaluation(loss, math.exp(min(loss, 700.0)), int(counted))
