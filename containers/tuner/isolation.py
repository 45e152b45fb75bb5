"""Documents that share a row must not see each other.

Best is `attention` that goes from document to document. Models that bring an attention of their own mostly keep them
apart by their position ids, which restart; some do not look (Falcon, up to 5.23). Nothing fails then: every document
is silently trained on as if the ones before it were its beginning. So each model is tried.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from kaito_flows.containers.tuner.attention import NAME, Documents, use_attention
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.errors import WeightsError

__all__ = ["Isolation", "choose_isolation", "document_mask"]

Isolation = Literal["documents", "positions", "mask"]
"""By our attention among documents, by the model's own with position ids that restart, or only by a mask."""

_LENGTH = 8
# Kernels round differently, in bfloat16 by hundredths.
_SAME = 0.05


def document_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what to add to attention scores, `[rows, 1, length, length]`: 0 where a token may look, else the least.

    Args:
        position_ids: `[rows, length]`, 0 where a document begins.
        dtype: the model's.
    """
    document = (position_ids == 0).cumsum(dim=1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    zero = torch.zeros((), dtype=dtype, device=position_ids.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]


def choose_isolation(model: Any, place: str) -> Isolation:
    """Return the first way that keeps two short documents apart in this model, and set its attention to it.

    Which one is measured. A model that was loaded with `eager` keeps that.

    Raises:
        WeightsError: (code `weights-unsupported`) there is none.
    """
    if model.config._attn_implementation == "sdpa":
        use_attention(model, NAME)
        if _attends_to_documents(model):
            return "documents"
        use_attention(model, "sdpa")
    for way in ("positions", "mask"):
        if _isolates(model, way):
            return way
    message = f"a {model.config.model_type} model lets documents in one row see each other"
    raise WeightsError(message, place=place, hint="choose another preset", code="weights-unsupported")


def _attends_to_documents(model: Any) -> bool:
    """Whether our attention keeps documents apart in this model, and gives each what the model's own gives it alone."""
    # Chunks of attention are told to a mask, of which there is none.
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return False
    try:
        return _isolates(model, "documents") and _attends_as_alone(model)
    except (TypeError, ValueError, RuntimeError) as exc:
        # The model hands on nothing that it does not know, or this device has no such kernel.
        if is_out_of_memory(exc):
            raise
        return False


@torch.no_grad()
def _attends_as_alone(model: Any) -> bool:
    weight = model.get_input_embeddings().weight
    ids = torch.arange(1, 1 + 2 * _LENGTH, device=weight.device)[None] % weight.shape[0]
    was_training = model.training
    model.eval()
    documents = Documents([2 * _LENGTH], weight.device).arguments(weight.dtype)
    logits = [model(input_ids=ids, use_cache=False, **given).logits.float() for given in (documents, {})]
    model.train(was_training)
    return bool((logits[0] - logits[1]).abs().max() <= _SAME * logits[1].abs().max())


def _isolates(model: Any, way: Isolation) -> bool:
    """Whether the second document's logits stay the same when the first is another, and no gradient goes there."""
    weight = model.get_input_embeddings().weight
    positions = torch.arange(_LENGTH, device=weight.device).repeat(1, 2)
    options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if way == "documents":
        options |= Documents([_LENGTH, _LENGTH], weight.device).arguments(weight.dtype)
    elif way == "mask":
        options["attention_mask"] = document_mask(positions, weight.dtype)
    second = torch.arange(1, 1 + _LENGTH, device=weight.device)
    was_training = model.training
    model.eval()
    found = [_second(model, torch.cat([first, second])[None], options) for first in (second, second + _LENGTH)]
    model.train(was_training)
    logits, leaks = zip(*found, strict=True)
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    return bool(max(difference, *leaks) <= 1e-4)


@torch.enable_grad()
def _second(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second document's logits, and what of their gradient goes to the first, as a share of the largest."""
    embedding, entered = model.get_input_embeddings(), []

    def enter(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        entered.append(output.detach().requires_grad_())
        return entered[-1]

    hook = embedding.register_forward_hook(enter)
    try:
        logits = model(input_ids=ids % embedding.weight.shape[0], **options).logits[0, _LENGTH:].float()
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), entered[0])
    largest = gradient[0].float().abs().amax(dim=1)
    return logits.detach(), largest[:_LENGTH].max() / largest.max()
