"""Out of memory: less goes through the device at once, each step sees the same tokens, and the run says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kaito_flows.containers.tuner import evaluation, training
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Batch, Dataset, divide
from kaito_flows.containers.tuner.job import TrainingConfig
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.memory import memory_errors
from kaito_flows.containers.tuner.model import adapter_files
from kaito_flows.containers.tuner.outcome import training_facts
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.training import train
from kaito_flows.errors import OutOfMemoryError

from .conftest import IDENTITY, Rows, adapted_model, make_config, make_dataset, make_root, run

CPU = torch.device("cpu")
SAID = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB."


def limited(allowed: Callable[[Batch], bool]) -> Callable[..., torch.Tensor]:
    """The loss on a device that does not hold more than that."""

    def loss(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
        summed = loss_sum(model, batch, **options)
        if not allowed(batch):
            raise torch.OutOfMemoryError(SAID)
        return summed

    return loss


def up_to(tokens: int) -> Callable[[Batch], bool]:
    return lambda batch: batch.tokens <= tokens


@pytest.fixture
def trains(models: dict[str, Path], dataset: Dataset, tmp_path: Path) -> Any:
    def trains(config: TrainingConfig, name: str, preemption: Preemption | None = None) -> tuple[bytes, State]:
        adapted = adapted_model(models["llama"], config)
        state = train(adapted, dataset, config, IDENTITY, tmp_path / name, preemption or Preemption())
        return adapter_files(adapted).weights, state

    return trains


def told(state: State, event: str = "out-of-memory") -> list[dict[str, Any]]:
    return [entry for entry in state.history if entry["event"] == event]


EACH_STEP = {"logging_steps": 1, "save_steps": 2}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rows_that_do_not_fit_together_are_trained_as_if_the_config_had_said_so(
    dropout: float, trains: Any, dataset: Dataset, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolved("lora", "llama", lora_dropout=dropout, **EACH_STEP)
    fits = resolved("lora", "llama", lora_dropout=dropout, **EACH_STEP, per_device_train_batch_size=1,
                    gradient_accumulation_steps=4)  # fmt: skip
    expected, undisturbed = trains(fits, "fits")
    monkeypatch.setattr(training, "loss_sum", limited(up_to(48)))
    adapter, state = trains(asked, "asked")
    assert adapter == expected
    assert told(state, "progress") == told(undisturbed, "progress"), "each step saw the same tokens"
    assert told(state) == [{"event": "out-of-memory", "step": 0, "of": "training", "at_once": "1 row"}]
    assert training_facts(state, dataset, asked.TrainingArguments, 10) == {
        **training_facts(undisturbed, dataset, asked.TrainingArguments, 10),
        "micro_batch_halvings": 1,
    }


def test_a_row_that_does_not_fit_is_divided_between_its_documents(
    trains: Any, dataset: Dataset, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama", **EACH_STEP, max_steps=4, learning_rate=1e-3)
    _, undisturbed = trains(config, "undisturbed")
    sizes: list[int] = []

    def fits(batch: Batch) -> bool:
        sizes.append(batch.tokens)
        return batch.tokens <= 24

    monkeypatch.setattr(training, "loss_sum", limited(fits))
    _, state = trains(config, "divided")
    assert [entry["at_once"] for entry in told(state)] == ["1 row", "1/2 of a row", "1/4 of a row"]
    assert state.targets == undisturbed.targets
    losses = [[entry["loss"] for entry in told(s, "progress")] for s in (state, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max(sizes[-10:]) <= 24


def test_memory_that_runs_out_in_mid_training_loses_no_step_and_a_resumed_run_remembers(
    trains: Any, resolved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama", **EACH_STEP, lora_dropout=0.1)

    def run_short(name: str, *, kill_after: int | None = None) -> tuple[bytes, State]:
        history = tmp_path / name / "history.jsonl"

        def steps() -> int:
            return history.read_text().count('"progress"')

        def fits(batch: Batch) -> bool:
            if kill_after is not None and steps() >= kill_after:
                raise KeyboardInterrupt
            # From the fourth step on, something else takes memory.
            return batch.tokens <= 48 or steps() < 3

        monkeypatch.setattr(training, "loss_sum", limited(fits))
        return trains(config, name)

    expected, whole = run_short("whole")
    assert [(entry["step"], entry["at_once"]) for entry in told(whole)] == [(3, "1 row")]
    with pytest.raises(KeyboardInterrupt):
        run_short("killed", kill_after=6)
    # As on a machine with more memory: what was begun with less goes on with less.
    monkeypatch.setattr(training, "loss_sum", loss_sum)
    adapter, resumed = trains(config, "killed")
    assert adapter == expected
    assert resumed.history == whole.history


def test_an_evaluation_that_does_not_fit_measures_the_same(
    trains: Any, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama", max_steps=2)
    _, undisturbed = trains(config, "undisturbed")
    monkeypatch.setattr(evaluation, "loss_sum", limited(up_to(100)))
    _, state = trains(config, "short")
    [entry] = told(state)
    assert (entry["of"], entry["at_once"]) == ("evaluation", "1 row")
    losses = [[entry["loss"] for entry in told(s, "evaluation")] for s in (state, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_document_that_does_not_fit_ends_the_run_with_what_can_be_done(
    trains: Any, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolved("lora", "llama")
    monkeypatch.setattr(training, "loss_sum", limited(lambda _: False))
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory") as caught, memory_errors(config):
        trains(config, "none")
    assert "gradient_checkpointing" in caught.value.hint


def test_what_is_no_lack_of_memory_is_not_tried_again(
    trains: Any, resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(training, "loss_sum", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        trains(resolved("lora", "llama"), "none")
    assert len(calls) == 1


def test_portions_are_halved_down_to_single_documents() -> None:
    portion, seen = Portion(5), []
    for _ in range(5):
        seen.append(str(portion))
        portion = portion.halved()
    assert seen == ["5 rows", "2 rows", "1 row", "1/2 of a row", "1/4 of a row"]


@pytest.mark.parametrize(("sizes", "parts"), [([9, 1, 1, 8], 2), ([5], 1), ([4, 4, 4], 3), (list(range(1, 20)), 4)])
def test_parts_are_about_equally_long_and_none_is_empty(sizes: list[int], parts: int) -> None:
    where = divide(sizes, parts)
    lengths = [sum(size for size, part in zip(sizes, where, strict=True) if part == number) for number in range(parts)]
    assert min(lengths) > 0
    assert max(lengths) - min(lengths) <= max(sizes)


def test_the_parts_of_a_row_hold_its_documents_once(dataset: Dataset) -> None:
    whole = dataset.train.batch(torch.tensor([3]), CPU)
    assert dataset.train.most_documents >= 3
    for parts in (2, 3):
        batches = list(dataset.train.batches(torch.tensor([3]), Portion(1, parts), CPU))
        assert sum(batch.tokens for batch in batches) == whole.tokens
        assert sorted(label for batch in batches for label in batch.labels.tolist()) == sorted(whole.labels.tolist())
        assert all(batch.tokens < whole.tokens for batch in batches)


SHORT_OF_MEMORY = f"""
import os
if os.environ.get("RANK") == "1":
    import torch
    from torch.nn import functional
    whole = functional.cross_entropy

    def cross_entropy(logits, labels, **options):
        if logits.requires_grad and len(labels) > 20:
            raise torch.OutOfMemoryError({SAID!r})
        return whole(logits, labels, **options)

    functional.cross_entropy = cross_entropy
"""


def test_when_one_of_two_processes_lacks_memory_both_take_less(
    trains: Any, resolved: Any, models: dict[str, Path], rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4}
    _, alone = trains(resolved("lora", "llama", **changed), "alone")
    dataset = make_dataset(tmp_path / "data", rows)
    world = {"nodes": 1, "processes": 2, "rendezvous": None}
    config = make_config("lora", "llama", **changed)
    root = make_root(tmp_path / "short", models["llama"], dataset, config, method="lora", world=world)
    (tmp_path / "sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, running = run(root)
    assert code == 0, (root.folder / "stderr.txt").read_text()
    halved = running.all("out-of-memory")
    assert {(entry["step"], entry["of"]) for entry in halved} == {(0, "training")}
    assert running.events[-1]["metrics"]["training"]["micro_batch_halvings"] == len(halved)
    for event in ("progress", "evaluation"):
        losses = [[entry["loss"] for entry in entries] for entries in (running.all(event), told(alone, event))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
