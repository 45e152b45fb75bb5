"""Sample answers of the base model and of the adapter, told and not published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kaito_flows.containers.program import read_job
from kaito_flows.containers.tuner import __main__ as program
from kaito_flows.containers.tuner import samples
from kaito_flows.containers.tuner.data import Dataset
from kaito_flows.containers.tuner.job import TunerJob
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.training import train
from kaito_flows.containers.tuner.world import ALONE

from .conftest import IDENTITY, adapted_model, make_config, make_root

ASKED = [
    {"messages": [{"role": "user", "content": "t100 t50"}], "answer": "t9 t9"},
    {"messages": [{"role": "user", "content": "t101 t60 t61 t62"}], "answer": "t10 t10"},
    {"messages": [{"role": "user", "content": " ".join(["t70"] * 2000)}], "answer": "t11"},
]


def greedy(model: Any, prompt: list[int]) -> str:
    """The words that come next, one forward pass each."""
    ids = list(prompt)
    for _ in range(samples.SAMPLE_TOKENS):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return " ".join(f"t{number}" for number in ids[len(prompt) :] if number > 2)


def test_both_answer_the_same_prompts_as_they_do_alone(
    models: dict[str, Path], dataset: Dataset, resolved: Any, tmp_path: Path
) -> None:
    config = resolved("lora", "llama", num_train_epochs=4.0)
    adapted = adapted_model(models["llama"], config)
    train(adapted, dataset, config, IDENTITY, tmp_path / "results", Preemption())
    (tmp_path / "samples.json").write_text(json.dumps(ASKED))
    told = samples.compare(adapted, models["llama"], tmp_path)
    assert [sample["messages"] for sample in told] == [sample["messages"] for sample in ASKED[:2]], "one is too long"
    assert [sample["expected"] for sample in told] == ["t9 t9", "t10 t10"]
    adapted.peft.eval()
    prompts = [[3, 100, 50, 4], [3, 101, 60, 61, 62, 4]]
    assert [sample["tuned"] for sample in told] == [greedy(adapted.model, prompt) for prompt in prompts]
    with adapted.peft.disable_adapter():
        assert [sample["base"] for sample in told] == [greedy(adapted.model, prompt) for prompt in prompts]
    assert all(sample["tuned"] != sample["base"] for sample in told)


def test_without_samples_nothing_is_answered(models: dict[str, Path], resolved: Any, tmp_path: Path) -> None:
    assert samples.compare(adapted_model(models["llama"], resolved("lora", "llama")), models["llama"], tmp_path) == []


def test_what_fails_is_told_and_costs_no_adapter(
    models: dict[str, Path], resolved: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = make_root(tmp_path / "root", models["llama"], "", make_config("lora", "llama"), method="lora")
    job = read_job(root.job, TunerJob)
    job.data.mkdir()
    (job.data / "samples.json").write_text("[{}]")
    program._tell_samples(adapted_model(models["llama"], resolved("lora", "llama")), job, ALONE)
    [event] = map(json.loads, capfd.readouterr().out.splitlines())
    assert event == {"event": "no-samples", "reason": "KeyError: 'messages'"}
