"""Documents into rows of equal length: best fit decreasing, and position ids that keep documents apart.

    document   a a a a a a  b b b  c c      row of 12:  a a a a a a b b b c c .
    position   0 1 2 3 4 5  0 1 2  0 1                  0 1 2 3 4 5 0 1 2 0 1 0

Attention that restarts where position ids do sees one document at a time. The padding at a row's end is a document of
its own, of which nothing is learned; nor is any document's first token, which nothing comes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kaito_flows.dataset.tokens import Document

Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows for training: `input_ids` int32, `loss_mask` uint8, `position_ids` int32, each `[rows, length]`.

    `documents` are in them with `tokens` in all, `trained_tokens` of them learned; `truncated` documents were longer
    than a row, and lost what did not fit.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    position_ids: NDArray[np.int32]
    documents: int
    tokens: int
    trained_tokens: int
    truncated: int

    @property
    def efficiency(self) -> float:
        """The share of the rows that is not padding."""
        return self.tokens / self.input_ids.size if self.input_ids.size else 0.0


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[Array, int]:
    """Assign each length to a bin of `capacity`: longest first, each into the fullest bin that still has room.

    Equal lengths keep their order. Uses at most 11/9 of the fewest possible bins, plus one (Johnson 1973).

    Returns:
        the bin of each item `[items]`, and how many bins there are.
    """
    bins: Array = np.zeros(len(lengths), np.int64)
    # rooms[n]: the bins with room for exactly n more; bit n of `open_rooms`: there are some.
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms, count = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = rooms[room].pop()
            if not rooms[room]:
                open_rooms ^= 1 << room
        else:
            room, chosen = capacity, count
            count += 1
        bins[item] = chosen
        left = room - length
        if left:
            if not rooms[left]:
                open_rooms |= 1 << left
            rooms[left].append(chosen)
    return bins, count


def pack(documents: Sequence[Document], *, length: int, packing: bool, pad_id: int) -> Packed:
    """Lay documents into rows; rows come in the order of their longest document, documents in a row as given.

    Without `packing`, each document has a row of its own.
    """
    lengths = np.array([min(len(d.ids), length) for d in documents], np.int64)
    alone = np.arange(len(documents), dtype=np.int64), len(documents)
    bins, count = best_fit_decreasing(lengths, length) if packing else alone
    rows, offsets = _places(lengths, bins, count)
    return _fill(documents, lengths, rows, offsets, (count, length), pad_id)


def _places(lengths: Array, bins: Array, count: int) -> tuple[Array, Array]:
    """Return the row of each document, and where in it the document begins; both `[documents]`."""
    # By the longest and not by the earliest: that would put rows of many short documents first.
    longest = np.full(count, -1, np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        if longest[bins[item]] < 0:
            longest[bins[item]] = item
    row_of_bin = np.empty(count, np.int64)
    row_of_bin[np.argsort(longest, kind="stable")] = np.arange(count)
    rows: Array = row_of_bin[bins] if count else np.zeros(0, np.int64)
    by_row = np.argsort(rows, kind="stable")
    ends = np.cumsum(lengths[by_row])
    starts = ends - lengths[by_row]
    first_in_row = np.searchsorted(rows[by_row], rows[by_row], side="left")
    offsets = np.empty(len(lengths), np.int64)
    offsets[by_row] = starts - starts[first_in_row]
    return rows, offsets


def _fill(
    documents: Sequence[Document],
    lengths: Array,
    rows: Array,
    offsets: Array,
    shape: tuple[int, int],
    pad_id: int,
) -> Packed:
    length = shape[1]
    input_ids = np.full(shape, pad_id, np.int32)
    loss_mask = np.zeros(shape, np.uint8)
    # Until a document says otherwise, each place is padding, which counts from the end of the row's documents.
    filled = np.bincount(rows, weights=lengths, minlength=shape[0]).astype(np.int64)
    position_ids = (np.arange(length)[None, :] - filled[:, None]).astype(np.int32)
    for document, size, row, offset in zip(documents, lengths.tolist(), rows.tolist(), offsets.tolist(), strict=True):
        place = slice(offset, offset + size)
        input_ids[row, place] = document.ids[:size]
        loss_mask[row, place] = document.learned[:size]
        loss_mask[row, offset] = 0
        position_ids[row, place] = np.arange(size)
    return Packed(
        input_ids,
        loss_mask,
        position_ids,
        documents=len(documents),
        tokens=int(lengths.sum()),
        trained_tokens=int(loss_mask.sum()),
        truncated=sum(len(document.ids) > length for document in documents),
    )
