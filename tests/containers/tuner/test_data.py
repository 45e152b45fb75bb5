"""Rows, their order, and how micro-batches are laid out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kaito_flows.containers.tuner.data import Batch, Split, epoch_order, lay_out, load_dataset, unpack
from kaito_flows.oci.images import open_image

from .conftest import LENGTH, PAD, Rows, make_dataset

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path, rows: Rows) -> Split:
    unpack(open_image(make_dataset(tmp_path / "registry", rows)), tmp_path / "data")
    return load_dataset(tmp_path / "data").train


def documents(batch: Batch) -> list[tuple[int, ...]]:
    """Every document of the batch that has a target, padding aside; sorted."""
    found = []
    learned = set((batch.sources + 1).tolist())
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
    for start, end in pairwise(starts):
        if any(place in learned for place in range(start, end)):
            found.append(tuple(ids[start:end]))
    return sorted(found)


def test_padding_is_told_from_tokens(split: Split, rows: Rows) -> None:
    assert split.lengths.tolist() == (rows["train"]["input_ids"] != PAD).sum(1).tolist()


def test_a_batch_holds_the_documents_of_its_rows_and_their_targets(split: Split, rows: Rows) -> None:
    chosen = [3, 0, 17]
    batch = split.batch(torch.tensor(chosen), CPU)
    train = rows["train"]
    expected = []
    for row in chosen:
        starts = [*np.flatnonzero(train["position_ids"][row] == 0), LENGTH]
        for start, end in pairwise(starts):
            if train["loss_mask"][row, start:end].any():
                expected.append(tuple(train["input_ids"][row, start:end].tolist()))
    assert documents(batch) == sorted(expected)
    assert batch.tokens == sum(map(len, expected))
    assert batch.targets == int(train["loss_mask"][chosen].sum())
    assert batch.input_ids.flatten()[batch.sources + 1].tolist() == batch.labels.tolist()
    assert batch.input_ids.numel() <= len(chosen) * LENGTH


def test_the_first_token_of_a_document_is_no_target_whatever_the_mask_says(split: Split) -> None:
    all_learned = Split(split.input_ids, torch.ones_like(split.loss_mask), split.position_ids, split.lengths)
    batch = all_learned.batch(torch.arange(4), CPU)
    assert bool((batch.position_ids.flatten()[batch.sources + 1] > 0).all())
    assert batch.targets == batch.tokens - int((split.position_ids[:4] == 0).sum()) + int(
        (split.lengths[:4] < LENGTH).sum()
    )


@pytest.mark.parametrize("sizes", [[5], [40, 3, 3, 9], [8] * 20, [33, 32, 31, 30], list(range(1, 50))])
def test_documents_do_not_overlap_and_stay_in_their_rows(sizes: list[int]) -> None:
    width, used, places = lay_out(sizes, 512)
    taken: set[int] = set()
    for size, place in zip(sizes, places, strict=True):
        span = set(range(place, place + size))
        assert not span & taken
        assert place // width == (place + size - 1) // width
        taken |= span
    assert sum(used) == len(taken) == sum(sizes)
    assert max(used) <= width


def test_short_documents_get_narrow_rows_and_no_more_tokens_than_they_had() -> None:
    width, used, _ = lay_out([32] * 64, 2048)
    assert (width, len(used)) == (32, 64)
    width, used, _ = lay_out([1000, *[40] * 26], 2048)
    assert width * len(used) <= 2048


def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    first = epoch_order(50, 7, 0, shuffle=True)
    assert sorted(first.tolist()) == list(range(50))
    assert torch.equal(first, epoch_order(50, 7, 0, shuffle=True))
    assert not torch.equal(first, epoch_order(50, 7, 1, shuffle=True))
    assert not torch.equal(first, epoch_order(50, 8, 0, shuffle=True))
    assert epoch_order(50, 7, 3, shuffle=False).tolist() == list(range(50))


def test_another_image_replaces_what_lay_there(tmp_path: Path, rows: Rows) -> None:
    unpack(open_image(make_dataset(tmp_path / "a", rows)), tmp_path / "data")
    assert load_dataset(tmp_path / "data").validation is not None
    unpack(open_image(make_dataset(tmp_path / "b", {"train": rows["validation"]})), tmp_path / "data")
    dataset = load_dataset(tmp_path / "data")
    assert len(dataset.train) == 4
    assert dataset.validation is None, "the first image's held-out data is gone"


def test_an_image_that_lies_there_is_not_unpacked_again(tmp_path: Path, rows: Rows) -> None:
    image = open_image(make_dataset(tmp_path / "registry", rows))
    unpack(image, tmp_path / "data")
    report = tmp_path / "data/report.md"
    report.write_text("mine")
    unpack(image, tmp_path / "data")
    assert report.read_text() == "mine"
    (tmp_path / "data/.digest").unlink()
    unpack(image, tmp_path / "data")
    assert report.read_text() == "# report\n"


def test_rows_without_a_target_are_left_out(tmp_path: Path, rows: Rows) -> None:
    mask = rows["train"]["loss_mask"].copy()
    mask[:5] = 0
    changed = {"train": {**rows["train"], "loss_mask": mask}}
    unpack(open_image(make_dataset(tmp_path / "registry", changed)), tmp_path / "data")
    assert len(load_dataset(tmp_path / "data").train) == 15
