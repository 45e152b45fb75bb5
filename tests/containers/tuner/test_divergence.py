"""A training that goes wrong stops, says why, and keeps the last checkpoint that was right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kaito_flows.containers.tuner import checkpoint, training
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Batch, Dataset
from kaito_flows.containers.tuner.divergence import WINDOW, held_out_fault, is_suspect, note_loss, training_fault
from kaito_flows.containers.tuner.evaluation import Evaluation
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.errors import DivergedError

from .conftest import IDENTITY, trained


def checkpoints(results: Path) -> list[str]:
    return sorted(path.name for path in (results / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint_that_was_right(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved("lora", "llama", learning_rate=1e30, warmup_steps=3, save_steps=1, max_grad_norm=0.0)
    with pytest.raises(DivergedError) as caught:
        trained(models["llama"], config, dataset, tmp_path)
    step = int(caught.value.place.removeprefix("step ").split()[0])
    # After the step before, the adapter was already one that gives no number.
    right = step - 2
    assert right >= 1
    assert checkpoints(tmp_path)[-1] == checkpoint.name_of(right)
    assert f"checkpoint of step {right} is kept" in caught.value.message
    kept = load_file(tmp_path / "checkpoints" / checkpoint.name_of(right) / checkpoint.ADAPTER)
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert caught.value.hint


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_single_gradient_that_is_no_number_is_enough(
    wrong: float, models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps = iter(range(100))

    def loss(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
        summed = loss_sum(model, batch, **options)
        return summed * wrong if next(steps) == 7 else summed

    monkeypatch.setattr(training, "loss_sum", loss)
    with pytest.raises(DivergedError, match=r"step 4 of 10.*checkpoint of step 2 is kept"):
        trained(models["llama"], resolved("lora", "llama"), dataset, tmp_path)


def test_a_loss_that_stays_far_above_where_it_began_stops_the_run(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with far too high a learning rate, from the thirtieth step on; checkpoints are due at every step."""
    seen = {"calls": 0}

    def loss(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
        summed = loss_sum(model, batch, **options)
        seen["calls"] += torch.is_grad_enabled()
        return summed + (5.0 * batch.targets if seen["calls"] > 30 else 0.0)

    monkeypatch.setattr(training, "loss_sum", loss)
    config = resolved(
        "lora", "llama", max_steps=100, save_steps=1, save_total_limit=2, gradient_accumulation_steps=1,
        learning_rate=1e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(DivergedError, match=rf"loss of the last {WINDOW} steps is .*, and was .* in the first 20") as e:
        trained(models["llama"], config, dataset, tmp_path)
    assert 36 <= int(e.value.place.removeprefix("step ").split()[0]) <= 50
    assert checkpoints(tmp_path) == ["step-000029", "step-000030"]
    assert "checkpoint of step 30 is kept" in e.value.message


def test_a_held_out_loss_far_above_the_bases_stops_the_run(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.5, 4.9, 5.1])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: Evaluation(next(losses), 1.0, 10))
    config = resolved("lora", "llama", eval_strategy="steps", eval_steps=2)
    with pytest.raises(DivergedError, match=r"held-out loss is 5.10, and was 3.00 before the first step.*of step 4 is"):
        trained(models["llama"], config, dataset, tmp_path)


def noted(*losses: float) -> State:
    state = State(IDENTITY)
    for loss in losses:
        note_loss(state, loss)
    return state


def test_what_goes_up_and_down_is_no_fault() -> None:
    begin, end = [3.0] * WINDOW, [2.0] * WINDOW
    for losses in (begin, [*begin, *end], [*begin, *[9.0] * 5, *end], [9.0, *begin], [*begin, *[4.9] * WINDOW]):
        assert training_fault(noted(*losses), shuffled=True) is None
    wrong = noted(*begin, *[5.1] * WINDOW)
    assert training_fault(wrong, shuffled=True)
    assert training_fault(wrong, shuffled=False) is None, "rows may get harder"
    assert is_suspect(noted(*begin, 5.1))
    assert not is_suspect(noted(*begin, 4.9))
    assert not is_suspect(noted(9.0))


def test_held_out_losses_are_compared_with_the_bases() -> None:
    history = [{"event": "evaluation", "step": 0, "loss": 3.0}]
    assert held_out_fault(history, 4.9) is None
    assert held_out_fault([], 400.0) is None
    assert held_out_fault(history, 5.2)
    assert held_out_fault([], math.nan) == "held-out loss is nan"
