"""Which blocks of a model compute their activations again in the backward pass, instead of keeping them.

A block that does keeps no more than its input, and takes a forward pass more: a third of a training's arithmetic. Where
memory is left, blocks keep theirs. What is computed is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from kaito_flows.containers.tuner.job import Estimate

__all__ = ["free_bytes", "keep_what_fits", "recompute_all", "recomputed"]


def free_bytes(device: torch.device) -> int | None:
    """How much of a GPU's memory is free; of a host's, which other programs use too, nothing is said."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def keep_what_fits(model: Any, estimate: Estimate, free: int) -> None:
    """Let as many blocks keep their activations as that much memory, with nothing loaded yet, holds of them.

    The last ones: theirs are gone again when the first ones compute theirs anew.
    """
    fitting = max(0, free - estimate.needed) // estimate.kept_block
    blocks = _blocks(model)
    for block in blocks[max(0, len(blocks) - fitting) :]:
        block.gradient_checkpointing = False


def recompute_all(model: Any) -> bool:
    """Let no block keep its activations; return whether one did."""
    kept = [block for block in _blocks(model) if not block.gradient_checkpointing]
    for block in kept:
        block.gradient_checkpointing = True
    return bool(kept)


def recomputed(model: Any) -> int:
    """How many blocks compute their activations again."""
    return sum(block.gradient_checkpointing for block in _blocks(model))


def _blocks(model: Any) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
