"""The best adapter is the one that is published, and a training that gets no better can stop early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kaito_flows.containers.tuner import checkpoint, training
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Dataset, Split
from kaito_flows.containers.tuner.evaluation import Evaluation, evaluate
from kaito_flows.containers.tuner.job import TrainingConfig
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.outcome import best_step, published_step, training_facts, without_gain
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.shipping import Shipping
from kaito_flows.containers.tuner.training import train
from kaito_flows.errors import ConfigError, PreemptedError

from .conftest import IDENTITY, Rows, adapted_model, make_config, make_dataset, make_root, run

BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}


class Scripted:
    """Held-out losses as they are told to be, one for each evaluation; SIGTERM comes in one of them, if it is to."""

    def __init__(self, *losses: float, until: int = 1000) -> None:
        self.losses, self.until = losses, until

    def __call__(self, adapted: Adapted, split: Split, portion: Portion, **options: Any) -> Evaluation | None:
        step = int(adapted.peft.step)
        return None if step >= self.until else Evaluation(self.losses[step], 1.0, 10)


@pytest.fixture
def trains(models: dict[str, Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains with scripted losses; returns the adapter, the adapter as it was after each step, and the state."""

    def trains(config: TrainingConfig, script: Scripted, name: str = "run") -> tuple[Any, list[Any], State]:
        adapted = adapted_model(models["llama"], config)
        found = list((tmp_path / name / "checkpoints").glob("step-*"))
        adapted.peft.step = max((int(path.name[5:]) for path in found), default=0)
        after: list[Any] = [copied(adapted)]
        step = torch.optim.AdamW.step

        def counting(optimizer: Any, *arguments: Any) -> None:
            step(optimizer, *arguments)
            adapted.peft.step += 1
            after.append(copied(adapted))

        monkeypatch.setattr(torch.optim.AdamW, "step", counting)
        monkeypatch.setattr(training, "evaluate", script)
        try:
            state = train(adapted, dataset, config, IDENTITY, tmp_path / name, Preemption())
        finally:
            monkeypatch.setattr(torch.optim.AdamW, "step", step)
        return copied(adapted), after, state

    return trains


def copied(adapted: Adapted) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


DIPS = (5.0, 4.0, 3.0, 2.0, 2.5, 2.0, 3.0, 3.5, 4.0, 4.0, 4.0)


def test_the_adapter_is_that_of_the_best_evaluation(trains: Any, dataset: Dataset, resolved: Any) -> None:
    config = resolved("lora", "llama", **BEST)
    adapter, after, state = trains(config, Scripted(*DIPS))
    assert (state.step, published_step(state, config.TrainingArguments)) == (10, 3)
    assert same(adapter, after[3])
    assert not same(adapter, after[10])
    facts = training_facts(state, dataset, config.TrainingArguments, 10)
    assert (facts["steps"], facts["best_step"]) == (10, 3)
    assert "steps_planned" not in facts


def test_unasked_the_adapter_is_that_of_the_last_step(trains: Any, dataset: Dataset, resolved: Any) -> None:
    config = resolved("lora", "llama", **{**BEST, "load_best_model_at_end": False})
    adapter, after, state = trains(config, Scripted(*DIPS))
    assert same(adapter, after[10])
    assert published_step(state, config.TrainingArguments) == 10
    assert "best_step" not in training_facts(state, dataset, config.TrainingArguments, 10)


def test_the_base_model_is_not_the_best_adapter(trains: Any, resolved: Any) -> None:
    adapter, after, _ = trains(resolved("lora", "llama", **BEST), Scripted(1.9, 3.8, *DIPS[2:7], *[3.8] * 4))
    assert same(adapter, after[3])


@pytest.mark.parametrize(
    ("patience", "threshold", "stops"), [(1, 0.0, 4), (3, 0.0, 6), (4, 0.0, 7), (9, 0.0, None), (2, 1.5, 3)]
)
def test_it_stops_early_when_it_gets_no_better(
    trains: Any, dataset: Dataset, resolved: Any, patience: int, threshold: float, stops: int | None
) -> None:
    config = resolved("lora", "llama", **BEST, early_stopping_patience=patience, early_stopping_threshold=threshold)
    adapter, after, state = trains(config, Scripted(*DIPS))
    assert state.step == (stops or 10)
    assert same(adapter, after[3])
    told = [entry for entry in state.history if entry["event"] == "stopped-early"]
    assert told == ([{"event": "stopped-early", "step": stops, "evaluations": patience}] if stops else [])
    facts = training_facts(state, dataset, config.TrainingArguments, 10)
    assert facts.get("steps_planned") == (10 if stops else None)


@pytest.mark.parametrize("stopped_at", [1, 3, 4, 6])
def test_stopped_and_gone_on_it_comes_to_the_same_adapter(trains: Any, resolved: Any, stopped_at: int) -> None:
    config = resolved("lora", "llama", **BEST, early_stopping_patience=4)
    expected, _, whole = trains(config, Scripted(*DIPS), "whole")
    with pytest.raises(PreemptedError):
        trains(config, Scripted(*DIPS, until=stopped_at), "stopped")
    adapter, _, state = trains(config, Scripted(*DIPS), "stopped")
    assert same(adapter, expected)
    assert state.history == whole.history


def test_evaluations_without_gain_are_counted_as_transformers_counts_them() -> None:
    history = [{"event": "evaluation", "step": step, "loss": loss} for step, loss in enumerate(DIPS)]
    assert [without_gain(history[: step + 1], 0.0) for step in range(11)] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    # From 4.0 to 3.0 and on to 2.0 is each time no more than 1.
    assert [without_gain(history[: step + 1], 1.0) for step in range(5)] == [0, 0, 1, 2, 3]
    assert best_step([]) is None


def test_overfitted_the_best_is_published_and_the_metrics_are_its_own(
    models: dict[str, Path], rows: Rows, tmp_path: Path
) -> None:
    """The whole program: two rows, learned by heart, and its checkpoints kept elsewhere."""
    few = {"train": {name: array[:2] for name, array in rows["train"].items()}, "validation": rows["validation"]}
    config = make_config(
        "lora", "llama", **BEST, max_steps=40, lr_scheduler_type="constant", early_stopping_patience=6,
        learning_rate=0.02, save_strategy="no",
    )  # fmt: skip
    dataset = make_dataset(tmp_path / "data", few)
    root = make_root(tmp_path / "root", models["llama"], dataset, config, method="lora")
    code, running = run(root)
    assert code == 0, (root.folder / "stderr.txt").read_text()
    metrics = running.events[-1]["metrics"]
    losses = {entry["step"]: entry["loss"] for entry in running.all("evaluation")}
    best = min(losses, key=lambda step: losses[step])
    assert 0 < best < max(losses) == best + 6 < 40
    assert metrics["training"]["best_step"] == best
    assert metrics["training"]["steps_planned"] == 40
    assert metrics["evaluation"]["after"]["loss"] == losses[best]
    assert running.all("stopped-early") == [{"event": "stopped-early", "step": best + 6, "evaluations": 6, "total": 40}]
    card = (root.results / "README.md").read_text()
    assert f"{losses[best]:.4f}" in card
    history = json.loads((root.results / "metrics.json").read_text())["history"]
    assert history[-1]["event"] == "stopped-early"


def test_what_is_published_is_what_was_measured(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    few = Dataset(
        Split(*(getattr(dataset.train, name)[:2] for name in ("input_ids", "loss_mask", "position_ids", "lengths"))),
        dataset.validation, {},
    )  # fmt: skip
    config = resolved("qlora", "phi3", **BEST, max_steps=25, lr_scheduler_type="constant", learning_rate=0.02)
    adapted = adapted_model(models["phi3"], config)
    state = train(adapted, few, config, IDENTITY, tmp_path, Preemption())
    losses = {e["step"]: e["loss"] for e in state.history if e["event"] == "evaluation"}
    best = published_step(state, config.TrainingArguments)
    assert losses[best] == min(losses.values()) < losses[25]
    assert few.validation is not None
    measured = evaluate(adapted, few.validation, Portion(3), stop=lambda: False)
    assert measured is not None
    assert measured.loss == losses[best]
    assert (tmp_path / "checkpoints/step-000025" / checkpoint.BEST).exists()


def test_without_held_out_data_there_is_no_best(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved("lora", "llama", **BEST)
    with pytest.raises(ConfigError, match="no held-out data"):
        train(adapted_model(models["llama"], config), Dataset(dataset.train, None, {}), config, IDENTITY, tmp_path,
              Preemption())  # fmt: skip


def test_the_best_adapter_travels_with_the_checkpoints(trains: Any, resolved: Any, tmp_path: Path) -> None:
    config = resolved("lora", "llama", **BEST)
    expected, _, _ = trains(config, Scripted(*DIPS), "whole")
    with pytest.raises(PreemptedError):
        trains(config, Scripted(*DIPS, until=6), "here")
    image = f"oci:{tmp_path / 'registry'}:checkpoint"
    Shipping(image, IDENTITY, 0).finish(tmp_path / "here/checkpoints")
    elsewhere = tmp_path / "elsewhere/checkpoints"
    elsewhere.mkdir(parents=True)
    assert Shipping(image, IDENTITY, 0).fetch(elsewhere, newer_than=0)
    adapter, _, state = trains(config, Scripted(*DIPS), "elsewhere")
    assert state.history[0]["step"] == 0
    assert same(adapter, expected)
