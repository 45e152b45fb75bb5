from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kaito_flows.dataset.packing import Packed, best_fit_decreasing, pack
from kaito_flows.dataset.tokens import Document

PAD = 9


def documents(seed: int, count: int, longest: int) -> list[Document]:
    """Documents whose tokens all tell which one it is, and which place in it."""
    dice = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(dice.integers(2, longest + 1))
        ids = (1000 * (number + 1) + np.arange(size)).astype(np.int32)
        made.append(Document(ids, dice.integers(0, 2, size).astype(np.uint8)))
    return made


def pieces(packed: Packed) -> list[tuple[Any, Any]]:
    """What a model that isolates documents by position ids sees: ids and mask of each, padding left out."""
    found = []
    for ids, mask, positions in zip(packed.input_ids, packed.loss_mask, packed.position_ids, strict=True):
        starts = np.flatnonzero(positions == 0)
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            if (ids[start:end] != PAD).any():
                found.append((ids[start:end], mask[start:end]))
            else:
                assert not mask[start:end].any()
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_alone_whole_and_there_once(seed: int, packing: bool) -> None:
    given = documents(seed, count=60, longest=50)
    packed = pack(given, length=40, packing=packing, pad_id=PAD)
    found = {int(ids[0]) // 1000 - 1: (ids, mask) for ids, mask in pieces(packed)}
    assert sorted(found) == list(range(60))
    for number, document in enumerate(given):
        ids, mask = found[number]
        assert ids.tolist() == document.ids[:40].tolist()
        assert mask.tolist() == [0, *document.learned[1:40].tolist()]
    assert packed.truncated == sum(len(d.ids) > 40 for d in given)
    assert packed.documents == 60
    assert packed.tokens == sum(min(len(d.ids), 40) for d in given)
    assert packed.trained_tokens == packed.loss_mask.sum()
    assert packed.input_ids.shape[0] == 60 or packing


def test_rows_have_the_types_and_shape_that_the_tuner_reads() -> None:
    packed = pack(documents(0, 10, 20), length=32, packing=True, pad_id=PAD)
    assert [a.dtype for a in (packed.input_ids, packed.loss_mask, packed.position_ids)] == [
        np.int32,
        np.uint8,
        np.int32,
    ]
    assert {a.shape[1] for a in (packed.input_ids, packed.loss_mask, packed.position_ids)} == {32}


def test_a_full_row_and_an_empty_split_are_packed() -> None:
    full = Document(np.arange(8, dtype=np.int32), np.ones(8, np.uint8))
    packed = pack([full, full], length=8, packing=True, pad_id=PAD)
    assert packed.efficiency == 1
    assert packed.input_ids.tolist() == [list(range(8))] * 2
    assert pack([], length=8, packing=True, pad_id=PAD).input_ids.shape == (0, 8)


def test_documents_in_a_row_and_rows_keep_their_order() -> None:
    sizes = [3, 7, 2, 5, 4, 6]
    given = [Document(np.full(n, 1000 * (i + 1), np.int32), np.ones(n, np.uint8)) for i, n in enumerate(sizes)]
    rows = [
        list(dict.fromkeys(int(x) // 1000 - 1 for x in row if x != PAD))
        for row in pack(given, length=9, packing=True, pad_id=PAD).input_ids
    ]
    assert all(row == sorted(row) for row in rows)
    longest = [max(row, key=lambda i: sizes[i]) for row in rows]
    assert longest == sorted(longest)


def test_rows_of_short_documents_do_not_come_first() -> None:
    given = documents(3, 3000, 100)
    packed = pack(given, length=100, packing=True, pad_id=PAD)
    counts = (packed.position_ids == 0).sum(axis=1)
    half = len(counts) // 2
    assert abs(counts[:half].mean() - counts[half:].mean()) < 0.3


@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 512])
def test_no_bin_overflows_and_few_are_used(capacity: int) -> None:
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 3000)
    bins, count = best_fit_decreasing(lengths, capacity)
    filled = np.bincount(bins, weights=lengths, minlength=count)
    assert filled.max() <= capacity
    assert filled.min() > 0
    assert count <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 1 or capacity < 8


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    bins, count = best_fit_decreasing(np.array([6, 5, 4, 3, 2]), 10)
    # 6+4 and 5+3+2: the 3 does not go where 4 would still have fitted exactly.
    assert count == 2
    assert bins[0] == bins[2]
    assert bins[1] == bins[3] == bins[4]


def test_a_hundred_thousand_documents_are_packed_in_seconds() -> None:
    dice = np.random.default_rng(0)
    sizes = np.minimum(2 + dice.lognormal(4.6, 0.9, 100_000).astype(int), 1024)
    given = [Document(np.zeros(n, np.int32), np.ones(n, np.uint8)) for n in sizes.tolist()]
    begin = time.process_time()
    packed = pack(given, length=1024, packing=True, pad_id=PAD)
    assert time.process_time() - begin < 10
    assert packed.efficiency > 0.99
