"""Counting what a trainer of transformers is given, and telling of each step as our tuner does."""

from __future__ import annotations

from typing import Any

import torch

from kaito_flows.containers.program import emit

__all__ = ["counted", "gpu_memory"]


def counted(trainer: Any) -> Any:
    """Return a subclass that counts tokens without padding, and those in the loss, as they enter a training step.

    Both are added up on the device and read when the loss is: no more waiting for it than there was.
    """

    class Counted(trainer):
        counts: torch.Tensor | None = None

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            tokens = torch.tensor(labels.numel(), device=labels.device) if mask is None else mask.sum()
            now = torch.stack([tokens, (labels[:, 1:] != -100).sum()])
            self.counts = now if self.counts is None else self.counts + now
            return super().training_step(model, inputs, *rest, **named)

        def log(self, logs: dict[str, Any], *rest: Any, **named: Any) -> None:
            super().log(logs, *rest, **named)
            if "loss" in logs and self.counts is not None:
                tokens, targets = self.counts.tolist()
                loss, step = float(logs["loss"]), self.state.global_step
                emit("progress", step=step, loss=loss, tokens=tokens, trained_tokens=targets)

    return Counted


def gpu_memory() -> dict[str, int]:
    """The most bytes of the GPU that this process had allocated and reserved; nothing without a GPU."""
    if not torch.cuda.is_initialized():
        return {}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
