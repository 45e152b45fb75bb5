"""The prepared dataset: rows of tokens, and the order in which an epoch goes through them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from kaito_flows.errors import DatasetError, disk_errors
from kaito_flows.oci.images import extract, open_image

NAMES = ("input_ids", "loss_mask", "position_ids")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one micro-step: token ids and positions, int64 [rows, length], and the targets' mask, bool."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor

    @property
    def targets(self) -> int:
        """How many tokens are predicted with loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class Split:
    """A split: int32 [rows, length] each. Documents are told apart by positions that restart at 0."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def batch(self, rows: torch.Tensor | slice, device: torch.device) -> Batch:
        """Return these rows on the device. A document's first token has no predecessor, so it is never a target."""
        positions = self.position_ids[rows]
        return Batch(
            self.input_ids[rows].long().to(device),
            positions.long().to(device),
            ((self.loss_mask[rows] != 0) & (positions != 0)).to(device),
        )


def epoch_order(rows: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of the rows in an epoch: a permutation that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def unpack(image: str, folder: Path) -> dict[str, Any]:
    """Unpack the dataset image under `folder`, unless it is there; return what `dataset.json` says.

    Raises:
        ImageError: no such image.
        DatasetError: it is no dataset.
        DiskFullError: no space left.
    """
    opened = open_image(image)
    marker = folder / ".digest"
    if not marker.exists() or marker.read_text() != opened.digest:
        extract(opened, folder)
        with disk_errors(folder):
            marker.write_text(opened.digest)
    try:
        facts: dict[str, Any] = json.loads((folder / "data/dataset.json").read_bytes())
    except (OSError, ValueError) as exc:
        raise DatasetError(f"dataset.json cannot be read: {exc}", place=image, code="dataset-damaged") from exc
    return facts


def load_split(folder: Path, name: str, vocabulary: int) -> Split | None:
    """Load a split; None when the dataset has none of that name.

    Raises:
        DatasetError: (code `dataset-damaged`) missing tensors, shapes that differ, ids outside of the vocabulary.
    """
    path = folder / "data" / f"{name}.safetensors"
    if not path.exists():
        return None
    place = f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise DatasetError(f"cannot be read: {exc}", place=place, code="dataset-damaged") from exc
    missing = [n for n in NAMES if n not in tensors]
    if missing:
        raise DatasetError(f"no tensor {missing[0]!r}", place=place, code="dataset-damaged")
    shapes = {tuple(tensors[n].shape) for n in NAMES}
    if len(shapes) != 1 or tensors["input_ids"].ndim != 2 or 0 in tensors["input_ids"].shape:
        raise DatasetError(f"shapes are {sorted(shapes)}", place=place, code="dataset-damaged")
    highest = int(tensors["input_ids"].max())
    if highest >= vocabulary or int(tensors["input_ids"].min()) < 0:
        message = f"token id {highest}, and the model knows {vocabulary}"
        hint = "the dataset was made with another tokenizer"
        raise DatasetError(message, place=place, hint=hint, code="dataset-damaged")
    return Split(tensors["input_ids"], tensors["loss_mask"], tensors["position_ids"])
