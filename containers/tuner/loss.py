"""The loss: cross-entropy over the target tokens alone, in float32, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kaito_flows.containers.tuner.data import Batch


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum the cross-entropy of each target token given what stands before it in its document.

    Logits are made only where a target follows: on a small model with a large vocabulary they are most of the work.
    """
    hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    before = batch.loss_mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][before]).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits, batch.input_ids[:, 1:][before], reduction="sum")
