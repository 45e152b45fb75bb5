"""Blocks that keep their activations where memory is left, and give that up first when it was not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kaito_flows.containers.program import read_job
from kaito_flows.containers.tuner import recompute, training
from kaito_flows.containers.tuner.__main__ import _load_model
from kaito_flows.containers.tuner.data import Batch, Dataset
from kaito_flows.containers.tuner.job import Estimate, TunerJob, read_config
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted, adapter_files
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.recompute import keep_what_fits, recompute_all, recomputed
from kaito_flows.containers.tuner.training import train
from kaito_flows.containers.tuner.world import ALONE
from kaito_flows.errors import InputError

from .conftest import IDENTITY, Rows, adapted_model, make_config, make_dataset, make_model, make_root

BLOCKS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "llama"
    make_model("llama", folder, num_hidden_layers=BLOCKS)
    return folder


@pytest.fixture
def adapted(deep: Path, resolved: Any) -> Adapted:
    return adapted_model(deep, resolved("lora", "llama", gradient_checkpointing=True))


def kept_bytes(adapted: Adapted, batch: Batch) -> int:
    """What autograd keeps of a step for its backward pass, each storage once."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sum(adapted.model, batch)
    return sum(seen.values())


@pytest.mark.parametrize(
    ("free", "expected"),
    [(0, BLOCKS), (999, BLOCKS), (1099, BLOCKS), (1100, BLOCKS - 1), (1399, BLOCKS - 3), (1600, 0), (10**12, 0)],
)
def test_as_many_blocks_keep_theirs_as_there_is_room_for(free: int, expected: int, adapted: Adapted) -> None:
    keep_what_fits(adapted.model, Estimate(needed=1000, kept_block=100), free)
    assert recomputed(adapted.model) == expected


def test_each_block_that_keeps_its_own_takes_as_much_more(adapted: Adapted, dataset: Dataset) -> None:
    batch = dataset.train.batch(torch.arange(4), CPU, flat=True)
    adapted.peft.train()
    taken = []
    for kept in range(BLOCKS + 1):
        recompute_all(adapted.model)
        keep_what_fits(adapted.model, Estimate(1, 1), 1 + kept)
        taken.append(kept_bytes(adapted, batch))
    more = [after - before for before, after in pairwise(taken)]
    assert min(more) > taken[0] / 4
    assert max(more) == pytest.approx(min(more), rel=0.05)


def test_what_is_learned_is_the_same_byte_for_byte(deep: Path, dataset: Dataset, resolved: Any, tmp_path: Path) -> None:
    weights = []
    for kept in (0, 2, BLOCKS):
        config = resolved("qlora", "llama", gradient_checkpointing=True, max_steps=4, lora_dropout=0.1)
        adapted = adapted_model(deep, config)
        keep_what_fits(adapted.model, Estimate(1, 1), 1 + kept)
        train(adapted, dataset, config, IDENTITY, tmp_path / str(kept), Preemption())
        weights.append(adapter_files(adapted).weights)
    assert weights[0] == weights[1] == weights[2]


def short_while_kept(adapted: Adapted) -> Any:
    def loss(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
        summed = loss_sum(model, batch, **options)
        if recomputed(model) < BLOCKS:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return summed

    return loss


def test_memory_that_runs_out_is_first_had_from_them_and_a_resumed_run_remembers(
    deep: Path, dataset: Dataset, resolved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama", gradient_checkpointing=True, max_steps=4, save_steps=2, logging_steps=1)
    plain = adapted_model(deep, config)
    train(plain, dataset, config, IDENTITY, tmp_path / "plain", Preemption())

    adapted = adapted_model(deep, config)
    keep_what_fits(adapted.model, Estimate(1, 1), 3)
    monkeypatch.setattr(training, "loss_sum", short_while_kept(adapted))
    state = train(adapted, dataset, config, IDENTITY, tmp_path / "short", Preemption())
    assert [e for e in state.history if e["event"] not in ("progress", "evaluation")] == [
        {"event": "recompute-all", "step": 0}
    ]
    assert state.portion is None
    assert adapter_files(adapted).weights == adapter_files(plain).weights

    again = adapted_model(deep, config)
    keep_what_fits(again.model, Estimate(1, 1), 3)
    monkeypatch.setattr(training, "loss_sum", loss_sum)
    train(again, dataset, config, IDENTITY, tmp_path / "short", Preemption())
    assert recomputed(again.model) == BLOCKS


def test_with_nothing_more_to_compute_again_less_goes_through_at_once(
    deep: Path, dataset: Dataset, resolved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama", gradient_checkpointing=True, max_steps=1)
    adapted = adapted_model(deep, config)
    keep_what_fits(adapted.model, Estimate(1, 1), 3)

    def loss(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
        summed = loss_sum(model, batch, **options)
        if recomputed(model) < BLOCKS or batch.tokens > 48:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return summed

    monkeypatch.setattr(training, "loss_sum", loss)
    state = train(adapted, dataset, config, IDENTITY, tmp_path, Preemption())
    told = [(e["event"], e.get("at_once")) for e in state.history if e["event"] not in ("progress", "evaluation")]
    assert told == [("recompute-all", None), ("out-of-memory", "1 row")]


@pytest.mark.parametrize(
    ("free", "gradient_checkpointing", "expected"),
    [(None, True, BLOCKS), (1200, True, BLOCKS - 2), (10**12, False, 0), (10**12, True, 0)],
    ids=["no GPU", "some room", "not wanted", "much room"],
)
def test_the_program_keeps_what_its_jobs_estimate_leaves_room_for(
    free: int | None, gradient_checkpointing: bool, expected: int, deep: Path, dataset: Dataset, rows: Rows,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = make_config("lora", "llama", gradient_checkpointing=gradient_checkpointing)
    memory = {"needed": 1000, "kept_block": 100}
    root = make_root(
        tmp_path / "a", deep, make_dataset(tmp_path / "registry", rows), config, method="lora", memory=memory
    )
    job = read_job(root.job, TunerJob)
    monkeypatch.setattr(recompute, "free_bytes", lambda _: free)
    adapted = _load_model(job, read_config(job.config_file, "lora"), dataset, ALONE)
    assert recomputed(adapted.model) == expected


def test_an_estimate_of_nothing_is_refused(deep: Path, rows: Rows, tmp_path: Path) -> None:
    config, memory = make_config("lora", "llama"), {"needed": 1000, "kept_block": 0}
    root = make_root(
        tmp_path / "a", deep, make_dataset(tmp_path / "registry", rows), config, method="lora", memory=memory
    )
    with pytest.raises(InputError, match="memory: must be at least 1"):
        read_job(root.job, TunerJob)
