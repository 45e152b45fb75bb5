"""Writing tensors as bfloat16 into a safetensors file, one at a time and without torch.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, little endian; the
header, JSON padded with spaces to a multiple of eight; the tensors' bytes, one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kaito_flows.errors import WeightsError

__all__ = ["Tensor", "write_bfloat16"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: its name, its shape, and how to get its float32 values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Floats]


def write_bfloat16(path: Path, tensors: Sequence[Tensor]) -> int:
    """Write the tensors in the order of their names and return the number of values written.

    Raises:
        WeightsError: a tensor has other than its shape, or holds a value that is not finite.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + 2 * prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            values = tensor.values()
            if values.shape != tensor.shape:
                raise WeightsError(f"shape is {values.shape}, not {tensor.shape}", place=tensor.name)
            if not np.isfinite(values).all():
                raise WeightsError("holds a value that is not finite", place=tensor.name)
            out.write(to_bfloat16(values).tobytes())
    return end // 2


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Return the bfloat16 bits of finite float32 values, rounded to nearest, ties to even, as torch does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
