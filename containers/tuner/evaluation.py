"""The loss on held-out data. Measuring it changes nothing of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kaito_flows.containers.tuner.data import Batch, Split
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.portion import Portion, ShortOfMemory
from kaito_flows.containers.tuner.world import ALONE, World

__all__ = ["Evaluation", "batches_of", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The mean loss over a split's targets in nats, its exponential, and how many targets there are."""

    loss: float
    perplexity: float
    tokens: int


def batches_of(adapted: Adapted, split: Split, rows: torch.Tensor, portion: Portion, world: World) -> Iterator[Batch]:
    """Yield this process's share of the rows, a portion at a time.

    Processes that hold the base model together go through it together: each yields as many batches as the others.
    """
    rounds = -(-world.largest_share(len(rows)) // portion.rows) if adapted.sharded else 0
    return split.batches(world.share(rows), portion, adapted.device, flat=adapted.flat, at_least=rounds)


@torch.no_grad()
def evaluate(
    adapted: Adapted, split: Split, portion: Portion, *, stop: Callable[[], bool], world: World = ALONE
) -> Evaluation | None:
    """Measure the loss over every target of the split, in all processes; None when `stop` said so in one of them.

    Raises:
        ShortOfMemory: the portion did not fit in one of the processes.
    """
    adapted.peft.eval()
    stopped, short = False, None
    total, targets = torch.zeros((), dtype=torch.float64), 0
    try:
        for batch in batches_of(adapted, split, torch.arange(len(split)), portion, world):
            # Who goes through the model together stops together, at the end.
            stopped = stopped or stop()
            if stopped and not adapted.sharded:
                break
            summed = loss_sum(adapted.model, batch, masked=adapted.masked)
            total += summed.double().cpu()
            targets += batch.targets
    except (RuntimeError, MemoryError) as exc:
        # Who goes through the model together cannot begin anew alone.
        if adapted.sharded or not is_out_of_memory(exc):
            raise
        # Its words alone: what it refers to would stay on the device.
        short = ShortOfMemory(str(exc))
    finally:
        adapted.peft.train()
    nats, counted, stops, shorts = world.totals(float(total), targets, stopped, short is not None)
    if shorts:
        raise short or ShortOfMemory()
    if stops:
        return None
    loss = nats / counted
    # exp overflows a float above 709.
    return Evaluation(loss, math.exp(min(loss, 700.0)), int(counted))
