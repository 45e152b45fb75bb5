"""Documents that share a row must not see each other.

Most models of transformers keep them apart by their position ids, which restart; some do not look (Falcon, up to 5.23).
Nothing fails then: every document is silently trained on as if the ones before it were its beginning. So each model is
tried, and those that need it are given a mask.
"""

from __future__ import annotations

from typing import Any

import torch

from kaito_flows.errors import WeightsError

__all__ = ["document_mask", "needs_mask"]

_LENGTH = 8


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


@torch.no_grad()
def needs_mask(model: Any, place: str) -> bool:
    """Whether the model keeps documents in one row apart only with `document_mask`; measured with two short ones.

    Raises:
        WeightsError: (code `weights-unsupported`) not even with the mask.
    """
    for masked in (False, True):
        if _isolates(model, masked):
            return masked
    message = f"a {model.config.model_type} model lets documents in one row see each other"
    raise WeightsError(message, place=place, hint="choose another preset", code="weights-unsupported")


def _isolates(model: Any, masked: bool) -> bool:
    """Whether the second document's logits stay the same when the first document is another."""
    embedding = model.get_input_embeddings().weight
    positions = torch.arange(_LENGTH, device=embedding.device).repeat(1, 2)
    mask = document_mask(positions, embedding.dtype) if masked else None
    was_training = model.training
    model.eval()
    logits = []
    for first in (1, 1 + _LENGTH):
        ids = torch.arange(first, first + _LENGTH, device=embedding.device)
        ids = torch.cat([ids, torch.arange(1, 1 + _LENGTH, device=embedding.device)])[None] % embedding.shape[0]
        output = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        logits.append(output.logits[0, _LENGTH:].float())
    model.train(was_training)
    difference = (logits[0] - logits[1]).abs().max()
    return bool(difference <= 1e-4 * logits[0].abs().max())
