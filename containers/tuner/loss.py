"""The loss: cross-entropy over the tokens that are learned, in float32, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kaito_flows.containers.tuner.data import Batch
from kaito_flows.containers.tuner.isolation import document_mask

__all__ = ["loss_sum"]

NARROW = 128
"""Up to this many tokens a row, plain attention is faster on CPUs than the flash kernel with its cost per block."""


def loss_sum(model: Any, batch: Batch, *, masked: bool = False) -> torch.Tensor:
    """Sum the cross-entropy of each target given what stands before it in its document.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: rows with at least one target.
        masked: whether the model needs a mask to keep documents apart (`isolation.needs_mask`).

    Logits are made only where a target follows: with a large vocabulary they are most of a small model's work. What the
    model does with logits (Gemma caps them) it does to these.
    """

    def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, batch.sources)[None],)

    embedding = model.get_input_embeddings().weight
    half = embedding.dtype in (torch.bfloat16, torch.float16)
    if embedding.device.type == "cpu":
        # For GPUs by its name, this chooses for CPUs too. It stays as it is until after the backward pass, in which
        # gradient checkpointing computes attention once more, and in the same way.
        torch.backends.cuda.enable_flash_sdp(batch.input_ids.shape[1] > NARROW)
    mask = document_mask(batch.position_ids, embedding.dtype) if masked else None
    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with torch.autocast(embedding.device.type, embedding.dtype, enabled=half):
            # LoRA's float32 matrices are multiplied in the type of what they are added to.
            # No cache: with one, positions that restart would not keep documents apart.
            output = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
            )
    finally:
        hook.remove()
    return functional.cross_entropy(output.logits[0].float(), batch.labels, reduction="sum")
