"""Attention among documents that lie one after the other in a single row: each sees itself alone, and no mask is made.

On a GPU that has them, flash kernels of PyTorch go from document to document (Dao 2023, arXiv:2307.08691). Elsewhere
documents that are about equally long are put beside each other, filled up at their ends, where none looks:

    a a a a b b b c c c c c d d   ─►   c c c c c    b b b   ─►   a a a a b b b c c c c c d d
                                       a a a a .    d d .
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "Documents", "to_device", "use_attention"]

NAME = "documents"
"""What models know this attention by."""

NARROW = 128
"""Up to so many tokens, plain attention is faster on CPUs than the flash kernel with its cost per block."""

_NOT_DONE = ("softcap", "s_aux", "position_bias")

FILLED = 0.6
"""How long the shortest document of a group is at least, as a share of the longest."""


class Documents:
    """Documents of these sizes, one after the other in a row on that device.

    `bounds` are where each begins, and the row's end, int32 `[documents + 1]`; `longest` is the longest one's length.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes = torch.tensor(sizes)
        self._device = device
        self.longest = max(sizes)
        self.bounds = to_device(torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """What to call a model of transformers with. Given a mask, it makes none; this one says nothing."""
        mask = torch.zeros((1, 1, 1, 1), dtype=dtype, device=self._device)
        return {"documents": self, "attention_mask": mask}

    @cached_property
    def groups(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The places of the tokens that are attended to together, and the way back.

        Returns:
            int64 `[documents, length]` for each group; and int64 `[tokens]`: where each token of the row is in those,
            one group after the other.
        """
        return _grouped(self._sizes, self._device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return it on the device; from pinned memory, so that the copy waits its turn there while work goes on here."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _grouped(sizes: torch.Tensor, device: torch.device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    ends, order = sizes.cumsum(0), sizes.argsort(descending=True, stable=True)
    back = torch.empty(int(ends[-1]), dtype=torch.int64)
    groups, filled, first = [], 0, 0
    while first < len(order):
        longest = int(sizes[order[first]])
        chosen = order[first:]
        chosen = chosen[sizes[chosen] >= FILLED * longest]
        columns = torch.arange(longest)
        # What a document does not fill is its last token once more.
        places = (ends - sizes)[chosen, None] + torch.minimum(columns, sizes[chosen, None] - 1)
        real = columns < sizes[chosen, None]
        back[places[real]] = filled + real.flatten().nonzero()[:, 0]
        groups.append(to_device(places, device))
        filled += places.numel()
        first += len(chosen)
    return tuple(groups), to_device(back, device)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: `[1, heads, tokens, size]` in, `[1, tokens, heads, size]` out.

    Without documents it is transformers' own.

    Raises:
        ValueError: the model asks for what is not done here.
    """
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if unknown := [name for name in _NOT_DONE if others.get(name) is not None]:
        raise ValueError(f"attention among documents does not do {unknown[0]}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else None
    if _has_flash(q) and not dropout:
        bounds, longest = documents.bounds, documents.longest
        left = -1 if window is None else window - 1
        gqa = q.shape[1] != k.shape[1]
        found = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=gqa
        )
        assert isinstance(found, torch.Tensor), "what else there is was not asked for"
        return found[None], None
    outputs = []
    groups, back = documents.groups
    for group in groups:
        length = group.shape[1]
        q_part, k_part, v_part = (t.index_select(0, group.flatten()).view(*group.shape, *t.shape[1:]).transpose(1, 2)
                                  for t in (q, k, v))  # fmt: skip
        if query.is_cuda:
            # Without flash, only the kernel that makes all scores takes fewer keys than queries.
            k_part, v_part = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k_part, v_part))
        mask = _window_mask(length, window, query.device)
        with _fitting_kernel(query.device, length):
            out = scaled_dot_product_attention(
                q_part,
                k_part,
                v_part,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q_part.shape[1] != k_part.shape[1],
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)[None], None


AttentionInterface.register(NAME, attend)
# For calls without documents: those of a model that writes text.
AttentionMaskInterface.register(NAME, sdpa_mask)


def _has_flash(query: torch.Tensor) -> bool:
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and size <= 256 and size % 8 == 0):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < window)


def _fitting_kernel(device: torch.device, length: int) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and length <= NARROW else nullcontext()


def use_attention(model: Any, name: str) -> None:
    """Let the model use that attention from now on, if it uses those that are registered, and not one of its own."""
    # `set_attn_implementation` logs a warning for each model that does not.
    model.config._attn_implementation = name
