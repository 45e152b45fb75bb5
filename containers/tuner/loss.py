"""The loss: cross-entropy over the tokens that are learned, in float32, summed.

Of many targets, logits are made chunk by chunk, and with each chunk's loss its gradient by the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from kaito_flows.containers.tuner.data import Batch
from kaito_flows.containers.tuner.isolation import document_mask

__all__ = ["chunk_of", "loss_sum"]

LOGITS, CHUNK = 2**24, 512
"""So many logits are in memory at once, or those of so many targets, whichever is more.

Fewer save little, and on a CPU cost memory: the C library returns only large blocks at once.
"""


def chunk_of(vocabulary: int) -> int:
    """Of how many targets logits are in memory at once; `kaito_flows/planning/memory.py` counts on it."""
    return max(CHUNK, LOGITS // vocabulary)


def loss_sum(model: Any, batch: Batch, *, masked: bool = False) -> torch.Tensor:
    """Sum the cross-entropy of each target given what stands before it in its document.

    Args:
        model: a causal language model of transformers, with or without adapters.
        batch: rows with at least one target.
        masked: whether the model needs a mask to keep documents apart (`isolation.choose_isolation`).

    Logits are made only where a target follows: with a large vocabulary they are most of a small model's work and, in
    float32 and with their gradient, of its memory. What the model does with logits (Gemma caps them) it does to these.
    """
    head, base = model.get_output_embeddings(), model.base_model
    chunk = chunk_of(head.weight.shape[0])
    # An adapter on the head learns from all logits; and one that is divided with the model must be gathered by all.
    alone = not isinstance(model, FSDPModule) and not any(p.requires_grad for p in head.parameters())
    chunked = batch.targets > chunk and base is not model and alone
    kept: list[torch.Tensor] = []
    outputs: list[Any] = []

    def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        chosen = inputs[0].flatten(0, 1).index_select(0, batch.sources)
        if not chunked:
            return (chosen[None],)
        kept.append(chosen)
        return (inputs[0][:1, :1].detach(),)

    def remember(_base: torch.nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output)

    embedding = model.get_input_embeddings().weight
    half = embedding.dtype in (torch.bfloat16, torch.float16)
    isolated: dict[str, Any] = {}
    if batch.documents:
        isolated = batch.documents.arguments(embedding.dtype)
    elif masked:
        isolated = {"attention_mask": document_mask(batch.position_ids, embedding.dtype)}
    with torch.autocast(embedding.device.type, embedding.dtype, enabled=half):
        with _hooked(head.register_forward_pre_hook(select), base.register_forward_hook(remember)):
            # LoRA's float32 matrices are multiplied in the type of what they are added to.
            # No cache: with one, positions that restart would not keep documents apart.
            output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **isolated)
        if not chunked:
            return _cross_entropy(output.logits[0], batch.labels)

        def loss_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            found = type(outputs[0])(**{**outputs[0], "last_hidden_state": hidden[None]})
            with _answering(model, found):
                return _cross_entropy(model(input_ids=batch.input_ids[:1, :1], use_cache=False).logits[0], labels)

        total: torch.Tensor = _InChunks.apply(kept[0], batch.labels, chunk, loss_of)  # type: ignore[no-untyped-call]
        return total


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")


class _InChunks(torch.autograd.Function):
    """A sum over chunks, with its gradient computed at once: no chunk's logits wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        chunk: int,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part, learned = hidden[start : start + chunk].detach(), labels[start : start + chunk]
            if gradient is None:
                total += loss_of(part, learned)
                continue
            with torch.enable_grad():
                loss = loss_of(part.requires_grad_(), learned)
            (gradient[start : start + chunk],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


@contextmanager
def _hooked(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _answering(model: Any, output: Any) -> Iterator[None]:
    """Put something in the base model's place that answers with that, and computes and gathers nothing."""
    base, stand_in = model.base_model, torch.nn.Module()
    stand_in.forward = lambda *_, **__: output
    setattr(model, model.base_model_prefix, stand_in)
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, base)
