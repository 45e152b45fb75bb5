"""The prepared dataset: rows of tokens, the order in which an epoch goes through them, and micro-batches.

input_ids      t t t t t t | t t t | p p p      three documents in a row; the last is padding
position_ids   0 1 2 3 4 5 | 0 1 2 | 0 1 2      restart at each document
loss_mask      0 0 0 1 1 1 | 0 0 1 | 0 0 0      1: this token is predicted, from those before it in its document
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from kaito_flows.containers.tuner.attention import Documents, to_device
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.errors import DatasetError, disk_errors
from kaito_flows.oci.images import Image, extract

__all__ = ["Batch", "Dataset", "Split", "divide", "epoch_order", "lay_out", "load_dataset", "unpack"]

FORMAT_VERSION = 1
NAMES = ("input_ids", "loss_mask", "position_ids")
_DIGEST = ".digest"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one micro-step.

    `input_ids` and `position_ids` are int64 `[rows, length]`; when there is but one row, without padding, `documents`
    may say where they lie in it. Each of the `labels` (int64 `[targets]`) is predicted
    from the token at its place in `sources` (int64 `[targets]`, counted through the flattened rows). `tokens` counts
    those that are not padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    labels: torch.Tensor
    tokens: int
    documents: Documents | None = None

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return self.labels.shape[0]


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of a split that hold targets, `[rows, length]` each; `lengths` `[rows]` are without the padding."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    lengths: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def most_documents(self) -> int:
        """How many documents the fullest row has."""
        real = torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
        return int(((self.position_ids == 0) & real).sum(1).max())

    def batch(
        self, rows: torch.Tensor, device: torch.device, part: int = 0, parts: int = 1, *, flat: bool = False
    ) -> Batch:
        """Return the documents of these rows on the device: in one row, if `flat`, or laid out so that it costs least.

        Documents do not see each other, so where they lie makes no difference to what is learned. With several parts,
        only the documents of one of them, which are about as long as those of each other.
        """
        real = torch.arange(self.input_ids.shape[1]) < self.lengths[rows, None]
        ids, mask, positions = (t[rows][real].long() for t in (self.input_ids, self.loss_mask, self.position_ids))
        sizes = _sizes(positions)
        if parts > 1:
            chosen = torch.tensor(divide(sizes.tolist(), parts)) == part
            kept = chosen.repeat_interleave(sizes)
            ids, mask, positions, sizes = ids[kept], mask[kept], positions[kept], sizes[chosen]
        # A document's first token has nothing before it.
        is_target = (mask != 0) & (positions != 0)
        labels = to_device(ids[is_target], device)
        if flat:
            return Batch(
                input_ids=to_device(ids[None], device),
                position_ids=to_device(positions[None], device),
                sources=to_device(is_target.nonzero()[:, 0] - 1, device),
                labels=labels,
                tokens=len(ids),
                documents=Documents(sizes.tolist(), device),
            )
        width, used, places = lay_out(sizes.tolist(), self.input_ids.shape[1])
        at = torch.tensor(places).repeat_interleave(sizes) + positions
        # What no document fills is a document of its own.
        new_positions = (torch.arange(width) - torch.tensor(used)[:, None]).flatten()
        new_positions[at] = positions
        new_ids = torch.zeros_like(new_positions)
        new_ids[at] = ids
        return Batch(
            input_ids=to_device(new_ids.view(-1, width), device),
            position_ids=to_device(new_positions.view(-1, width), device),
            sources=to_device(at[is_target] - 1, device),
            labels=labels,
            tokens=len(ids),
        )

    def batches(
        self, rows: torch.Tensor, portion: Portion, device: torch.device, *, flat: bool = False, at_least: int = 0
    ) -> Iterator[Batch]:
        """Yield the rows, a portion at a time, in their order; then batches without targets, up to `at_least` in all.

        Parts of a row in which nothing is to be learned are left out.
        """
        for start in range(0, len(rows), portion.rows):
            chunk = rows[start : start + portion.rows]
            if portion.parts == 1:
                yield self.batch(chunk, device, flat=flat)
                continue
            parts = min(portion.parts, int((self.position_ids[chunk, : int(self.lengths[chunk])] == 0).sum()))
            batches = (self.batch(chunk, device, part, parts, flat=flat) for part in range(parts))
            yield from (batch for batch in batches if batch.targets)
        for _ in range(-(-len(rows) // portion.rows), at_least):
            some = self.batch(torch.tensor([0]), device, flat=flat)
            yield replace(some, sources=some.sources[:0], labels=some.labels[:0], tokens=0)

    def check_against(self, vocabulary: int, context: int | None, *, place: str) -> None:
        """See that the model knows every token id, and has room for the longest document.

        Raises:
            DatasetError: (code `dataset-misfit`) not so.
        """
        low, high = int(self.input_ids.min()), int(self.input_ids.max())
        if low < 0 or high >= vocabulary:
            wrong = high if high >= vocabulary else low
            message = f"holds token id {wrong}, but the model knows 0 to {vocabulary - 1}"
            hint = "the dataset was made with another tokenizer"
            raise DatasetError(message, place=place, hint=hint, code="dataset-misfit")
        longest = int(self.position_ids.max()) + 1
        if context is not None and longest > context:
            message = f"holds a document of {longest} tokens, but the model's context is {context}"
            raise DatasetError(message, place=place, hint="lower max_length", code="dataset-misfit")


def _sizes(positions: torch.Tensor) -> torch.Tensor:
    """Return how long each document is, of those that lie one after the other in flat position ids."""
    starts = (positions == 0).nonzero()[:, 0]
    return torch.diff(starts, append=torch.tensor([len(positions)]))


def divide(sizes: Sequence[int], parts: int) -> list[int]:
    """Return the part of each document, so that parts are about equally long and none is empty: longest first."""
    filled = [0] * parts
    where = [0] * len(sizes)
    for document in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        where[document] = filled.index(min(filled))
        filled[where[document]] += sizes[document]
    return where


@dataclass(frozen=True, slots=True)
class Dataset:
    """The splits, and what `dataset.json` says; without held-out data `validation` is None."""

    train: Split
    validation: Split | None
    facts: dict[str, Any]


LINEAR_COST = 2048
"""What a token costs in the linear layers, in units of what it costs to attend to one other token; measured roughly."""


def lay_out(sizes: Sequence[int], longest_row: int) -> tuple[int, list[int], list[int]]:
    """Lay documents of these sizes into rows of one width, first fit decreasing, so that training on them costs least.

    Each token costs its way through the linear layers, padding too, and attention to each token of its row. So narrow
    rows are good, unless too much of them is padding.

    Returns:
        the width, how much of each row is used, and the place of each document in the flattened rows.
    """
    narrowest, total = max(sizes), sum(sizes)
    best: tuple[int, list[int], list[int]] | None = None
    for width in _widths(narrowest, max(narrowest, min(longest_row, total))):
        if best is None or _cost(-(-total // width), width) < _cost(len(best[1]), best[0]):
            used, places = _first_fit(sizes, width)
            if best is None or _cost(len(used), width) < _cost(len(best[1]), best[0]):
                best = width, used, places
    assert best is not None
    return best


def _widths(narrowest: int, widest: int) -> list[int]:
    """Return widths to try, each half as wide again as the one before, in multiples of 8, which suit GPUs."""
    widths = [narrowest]
    while widths[-1] < widest:
        widths.append(min(widths[-1] * 3 // 2 + 1, widest))
    return sorted({-(-width // 8) * 8 for width in widths})


def _cost(rows: int, width: int) -> int:
    return rows * width * (LINEAR_COST + width)


def _first_fit(sizes: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    used: list[int] = []
    places = [0] * len(sizes)
    for document in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[document]
        row = next((row for row, filled in enumerate(used) if filled + size <= width), len(used))
        if row == len(used):
            used.append(0)
        places[document] = row * width + used[row]
        used[row] += size
    return used, places


def epoch_order(rows: int, seed: int, epoch: int, *, shuffle: bool) -> torch.Tensor:
    """Return the order of the rows in an epoch, int64 `[rows]`; it depends on the arguments alone."""
    if not shuffle:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch))


def unpack(image: Image, folder: Path) -> None:
    """Bring the dataset image's `data/` into `folder`, unless that image lies there.

    Raises:
        ImageError: (code `image-damaged`) a layer is not a tar.
        DiskFullError: no space left.
    """
    marker = folder / _DIGEST
    if marker.is_file() and marker.read_text(encoding="utf-8") == image.digest:
        return
    with disk_errors(folder):
        # The folder may be a volume, which cannot be renamed to: its files are replaced, and the marker comes last.
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob("*.json")):
            old.unlink()
        try:
            extract(image, partial, only="data")
            for path in sorted(partial.glob("data/*")):
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        marker.write_text(image.digest, encoding="utf-8")


def load_dataset(folder: Path) -> Dataset:
    """Read an unpacked dataset.

    Raises:
        DatasetError: (code `dataset-damaged`) a file or tensor is missing, shapes differ, positions jump; or nothing is
            to be learned.
    """
    path = folder / "dataset.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        version, pad = facts["format_version"], int(facts["pad_token_id"])
    except OSError as exc:
        raise _damaged("is missing", path) from exc
    except (ValueError, TypeError, KeyError) as exc:
        raise _damaged(f"is not what a dataset's facts look like: {exc!r}", path) from exc
    if version != FORMAT_VERSION:
        raise _damaged(f"format version {version}, and only {FORMAT_VERSION} is known", path)
    validation = folder / "validation.safetensors"
    return Dataset(
        train=_load_split(folder / "train.safetensors", pad),
        validation=_load_split(validation, pad) if validation.exists() else None,
        facts=facts,
    )


def _load_split(path: Path, pad: int) -> Split:
    if not path.is_file():
        raise _damaged("is missing", path)
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise _damaged(f"cannot be read: {exc}", path) from exc
    for name in NAMES:
        if name not in tensors:
            raise _damaged(f"has no tensor {name!r}", path)
        if tensors[name].is_floating_point() or tensors[name].ndim != 2:
            raise _damaged(f"{name} must be integers [rows, length]", path)
    shapes = {name: list(tensors[name].shape) for name in NAMES}
    if len(set(map(tuple, shapes.values()))) != 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise _damaged(f"shapes differ: {told}", path)
    ids, mask, positions = (tensors[name] for name in NAMES)
    if ids.numel() == 0:
        raise _damaged("holds no tokens", path)
    steps = positions[:, 1:] - positions[:, :-1]
    if bool((positions[:, 0] != 0).any()) or bool(((steps != 1) & (positions[:, 1:] != 0)).any()):
        raise _damaged("position_ids must count up, and restart at 0", path)
    learned = ((mask != 0) & (positions != 0)).any(dim=1)
    if not bool(learned.any()):
        raise _damaged("holds no token that is learned", path)
    lengths = _lengths(ids, mask, positions, pad)
    if not bool(learned.all()):
        ids, mask, positions, lengths = (tensor[learned] for tensor in (ids, mask, positions, lengths))
    return Split(ids, mask, positions, lengths)


def _lengths(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, pad: int) -> torch.Tensor:
    """Return each row's tokens before the padding, int64 `[rows]`."""
    places = torch.arange(ids.shape[1])
    last_document = torch.where(positions == 0, places, 0).amax(dim=1)
    in_last = places >= last_document[:, None]
    is_padding = ((ids == pad) & (mask == 0)) | ~in_last
    return torch.where(is_padding.all(dim=1), last_document, ids.shape[1])


def _damaged(message: str, path: Path) -> DatasetError:
    hint = "have the dataset made again"
    return DatasetError(message, place=path.name, hint=hint, code="dataset-damaged")
