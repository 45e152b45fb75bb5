"""The mathematics: the loss against a plain loop, packing, accumulation, evaluation, schedules, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from kaito_flows.containers.tuner import checkpoint
from kaito_flows.containers.tuner.data import Dataset, Split
from kaito_flows.containers.tuner.evaluation import evaluate
from kaito_flows.containers.tuner.isolation import choose_isolation, document_mask
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.schedule import learning_rate, steps_in_all
from kaito_flows.containers.tuner.training import train
from kaito_flows.errors import PreemptedError

from .conftest import IDENTITY, LENGTH, TARGETS, adapted_model, make_model, trained

CPU = torch.device("cpu")


def reference_loss(model: Any, split: Split, rows: list[int]) -> float:
    """Each document alone, one forward pass each, every target's loss added up."""
    total = 0.0
    for row in rows:
        starts = [*np.flatnonzero(split.position_ids[row].numpy() == 0), LENGTH]
        for start, end in pairwise(starts):
            ids, mask = split.input_ids[row, start:end].long(), split.loss_mask[row, start:end]
            if not mask.any():
                continue
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            for place in range(1, len(ids)):
                if mask[place]:
                    total += float(functional.cross_entropy(logits[place - 1], ids[place]))
    return total


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral", "qwen2", "gemma2", "phi", "falcon"])
def test_packed_documents_do_not_see_each_other_and_only_answers_are_learned(
    kind: str, attention: str, dataset: Dataset
) -> None:
    changed = {"sliding_window": 16} if kind in ("phi3", "mistral", "gemma2") else {}
    model = make_model(kind, attn_implementation="eager" if kind == "gemma2" else attention, **changed).eval()
    rows = [0, 5, 6, 11]
    with torch.no_grad():
        isolation = choose_isolation(model, kind)
        batch = dataset.train.batch(torch.tensor(rows), CPU, flat=isolation == "documents")
        packed = float(loss_sum(model, batch, masked=isolation == "mask"))
    if kind == "falcon":  # It has an attention of its own; up to transformers 5.23 it needed a mask.
        assert isolation != "documents"
    else:
        assert isolation == ("documents" if attention == "sdpa" and kind != "gemma2" else "positions")
        # Rows that were laid out are right too.
        with torch.no_grad():
            rowwise = float(loss_sum(model, dataset.train.batch(torch.tensor(rows), CPU)))
        assert rowwise == pytest.approx(packed, rel=1e-5)
    assert packed == pytest.approx(reference_loss(model, dataset.train, rows), rel=1e-5)


def test_the_mask_shows_each_token_those_before_it_in_its_document() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2]]), torch.float32)
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_documents_in_wide_rows_do_not_see_each_other_either(dataset: Dataset) -> None:
    model = make_model("phi3").eval()
    split = dataset.train
    long = torch.full((1, LENGTH), 40, dtype=torch.int32)
    document = torch.arange(LENGTH, dtype=torch.int32)[None]
    mask = torch.zeros_like(split.loss_mask[:1])
    # One document that fills a row: no width but the widest is left to the others.
    with_long = Split(
        torch.cat([split.input_ids[:3], long]),
        torch.cat([split.loss_mask[:3], mask]),
        torch.cat([split.position_ids[:3], document]),
        torch.cat([split.lengths[:3], torch.tensor([LENGTH])]),
    )
    batch = with_long.batch(torch.arange(4), CPU)
    assert batch.input_ids.shape[1] == LENGTH
    with torch.no_grad():
        assert float(loss_sum(model, batch)) == pytest.approx(reference_loss(model, split, [0, 1, 2]), rel=1e-5)


def test_one_step_of_four_rows_is_two_of_two(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    whole = resolved("lora", "llama", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    parts = resolved("lora", "llama", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    ones = resolved("lora", "llama", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    first, *others = (
        trained(models["llama"], config, dataset, tmp_path / str(i)) for i, config in enumerate([whole, parts, ones])
    )
    for other in others:
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_step_is_adamw_on_the_mean_over_the_steps_targets(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved("lora", "llama", max_steps=2, shuffle_dataset=False, warmup_steps=0, max_grad_norm=0.3)
    result = trained(models["llama"], config, dataset, tmp_path)
    # The same by hand, one row at a time.
    adapted = adapted_model(models["llama"], config)
    arguments = config.TrainingArguments
    optimizer = torch.optim.AdamW(adapted.parameters.values(), lr=0.01, weight_decay=0.01)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 2))
        rows = range(4 * step, 4 * step + 4)
        targets = int(dataset.train.loss_mask[list(rows)].sum())
        optimizer.zero_grad()
        for row in rows:
            (loss_sum(adapted.model, dataset.train.batch(torch.tensor([row]), CPU)) / targets).backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters.values(), arguments.max_grad_norm)
        optimizer.step()
    for name, tensor in result.items():
        torch.testing.assert_close(adapted.parameters[name].detach(), tensor, rtol=1e-3, atol=1e-4)


def test_an_evaluation_in_between_changes_nothing(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    """In 4 bits and bfloat16, where bitsandbytes would repack its layers."""
    types = {"torch_dtype": "bfloat16", "bnb_4bit_compute_dtype": "bfloat16", "lora_dropout": 0.1}
    without = trained(models["phi3"], resolved(**types), dataset, tmp_path / "a")
    config = resolved(**types, eval_strategy="steps", eval_steps=1)
    with_evaluations = trained(models["phi3"], config, dataset, tmp_path / "b")
    assert all(torch.equal(without[name], with_evaluations[name]) for name in without)


def test_gradients_are_the_same_before_and_after_an_evaluation(
    models: dict[str, Path], dataset: Dataset, resolved: Any
) -> None:
    config = resolved(torch_dtype="bfloat16", bnb_4bit_compute_dtype="bfloat16")
    adapted = adapted_model(models["phi3"], config)
    batch = dataset.train.batch(torch.arange(3), CPU)

    def gradients() -> list[torch.Tensor]:
        adapted.peft.zero_grad()
        loss_sum(adapted.model, batch).backward()
        return [p.grad.clone() for p in adapted.parameters.values() if p.grad is not None]

    before = gradients()
    assert dataset.validation is not None
    assert evaluate(adapted, dataset.validation, Portion(2), stop=lambda: False) is not None
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_gradient_checkpointing_changes_memory_and_not_gradients(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    plain = trained(models["phi3"], resolved(max_steps=3), dataset, tmp_path / "a")
    saving = trained(models["phi3"], resolved(max_steps=3, gradient_checkpointing=True), dataset, tmp_path / "b")
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [{"use_dora": True}, {"use_rslora": True}, {"bnb_4bit_quant_type": "fp4"}])
def test_variants_of_lora_train_too(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path, changed: dict[str, Any]
) -> None:
    config = resolved(max_steps=4, **changed)
    adapted = adapted_model(models["phi3"], config)
    state = train(adapted, dataset, config, IDENTITY, tmp_path, Preemption())
    before, after = (e["loss"] for e in state.history if e["event"] == "evaluation")
    assert after < before


def test_the_base_is_frozen_and_in_four_bits_and_the_adapter_in_float32(models: dict[str, Path], resolved: Any) -> None:
    adapted = adapted_model(models["phi3"], resolved(torch_dtype="bfloat16", bnb_4bit_compute_dtype="bfloat16"))
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in adapted.parameters.items())
    layers = [m for m in adapted.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    quantised = [m for m in layers if m.weight.dtype == torch.uint8]
    assert len(quantised) == 2 * len(TARGETS["phi3"])
    assert adapted.model.model.norm.weight.dtype == torch.bfloat16
    assert not adapted.model.config.use_cache


def test_sizes_that_break_bitsandbytes_fused_kernel_can_be_trained(
    dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    make_model("llama", tmp_path / "odd", hidden_size=80, intermediate_size=172, head_dim=20)
    config = resolved(
        "qlora", "llama", max_steps=2, torch_dtype="bfloat16", bnb_4bit_compute_dtype="bfloat16", warmup_steps=0
    )
    assert trained(tmp_path / "odd", config, dataset, tmp_path / "results")


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.25}, {}])
def test_schedules_are_those_of_transformers(kind: str, warmup: dict[str, Any], resolved: Any) -> None:
    arguments = resolved(lr_scheduler_type=kind, **{"warmup_steps": 0, **warmup}).TrainingArguments
    total = 11
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    steps = arguments.warmup_steps or math.ceil(total * arguments.warmup_ratio)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=steps, num_training_steps=total)
    for step in range(total):
        assert learning_rate(arguments, step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_steps_are_counted_by_epochs_or_as_asked(resolved: Any) -> None:
    assert steps_in_all(resolved(num_train_epochs=1.5).TrainingArguments, 10) == 15
    assert steps_in_all(resolved(num_train_epochs=0.01).TrainingArguments, 10) == 1
    assert steps_in_all(resolved(max_steps=7).TrainingArguments, 10) == 7


def test_a_checkpoint_that_is_damaged_or_anothers_is_passed_over(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = resolved(save_steps=1, save_total_limit=4, max_steps=4)
    undisturbed = trained(models["phi3"], config, dataset, tmp_path / "a")
    again = trained(models["phi3"], config, dataset, tmp_path / "b")
    checkpoints = tmp_path / "b/checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step-00000{n}" for n in (1, 2, 3, 4)]
    content = bytearray((checkpoints / "step-000004/optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoints / "step-000004/optimizer.safetensors").write_bytes(content)
    state = json.loads((checkpoints / "step-000003/state.json").read_text())
    state["state"]["identity"] = "ef" * 32
    (checkpoints / "step-000003/state.json").write_text(json.dumps(state))
    capfd.readouterr()
    again = trained(models["phi3"], config, dataset, tmp_path / "b")
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {"event": "resumed", "step": 2} in events
    assert all(torch.equal(undisturbed[name], again[name]) for name in undisturbed)


def test_no_file_of_a_checkpoint_is_a_pickle(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    trained(models["phi3"], resolved(max_steps=2), dataset, tmp_path)
    files = {p.name for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert files == {checkpoint.ADAPTER, checkpoint.OPTIMIZER, checkpoint.STATE}


def test_sigterm_during_an_evaluation_ends_it_and_saves_the_step_before(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    class AtTheSecondEvaluation(Preemption):
        """SIGTERM comes after the first training step has been logged."""

        @property
        def requested(self) -> bool:
            history = tmp_path / "history.jsonl"
            return history.exists() and '"progress"' in history.read_text()

        @requested.setter
        def requested(self, value: bool) -> None: ...

    config = resolved(logging_steps=1, eval_strategy="steps", eval_steps=1, save_steps=100)
    with pytest.raises(PreemptedError, match=r"step 1 of 10.*checkpoint of step 1 is saved"):
        train(adapted_model(models["phi3"], config), dataset, config, IDENTITY, tmp_path, AtTheSecondEvaluation())
    assert (tmp_path / "checkpoints/step-000001/state.json").exists()


def test_what_allocators_say_is_known_and_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value) or "overflow" in str(caught.value) or "invalid" in str(caught.value).lower()
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_configs_sections_are_frozen(resolved: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved().LoraConfig.r = 3
