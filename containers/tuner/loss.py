"""The loss: cross-entropy over the tokens that are learned, in float32, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kaito_flows.containers.tuner.data import Batch

__all__ = ["loss_sum"]


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum the cross-entropy of each target given what stands before it in its document.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: rows with at least one target.

    Logits are made only where a target follows: with a large vocabulary they are most of a small model's work. What the
    model does with logits (Gemma caps them) it does to these.
    """

    def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, batch.sources)[None],)

    embedding = model.get_input_embeddings().weight
    half = embedding.dtype in (torch.bfloat16, torch.float16)
    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        # LoRA's float32 matrices are multiplied in the model's type, as what they are added to is.
        with torch.autocast(embedding.device.type, embedding.dtype, enabled=half):
            # No attention mask, and no cache: then positions that restart keep the documents of a row apart.
            output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        hook.remove()
    return functional.cross_entropy(output.logits[0].float(), batch.labels, reduction="sum")
