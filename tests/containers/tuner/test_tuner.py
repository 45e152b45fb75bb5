"""The program as a process: it trains, proves, publishes; is killed and goes on; and does nothing twice."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.torch import load as load_tensors
from transformers import AutoModelForCausalLM

from kaito_flows.oci.images import open_image, read_file

from .conftest import (
    IDENTITY,
    TARGETS,
    Root,
    Rows,
    Running,
    make_config,
    make_dataset,
    make_model,
    make_root,
    run,
    start,
)

# Everything that could make a resumed run differ: dropout, accumulation, evaluations in between, a short last step.
HARD: dict[str, Any] = {"lora_dropout": 0.05, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2}


SAMPLES = [{"messages": [{"role": "user", "content": "t100 t50"}], "answer": "t9 t9"}]


def hard_root(folder: Path, models: dict[str, Path], rows: Rows) -> Root:
    dataset = make_dataset(folder / "data-registry", rows, **{"samples.json": json.dumps(SAMPLES).encode()})
    return make_root(folder / "root", models["phi3"], dataset, make_config("qlora", "phi3", **HARD))


def adapter_hash(root: Root) -> str:
    return hashlib.sha256((root.results / "adapter_model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Tuned:
    root: Root
    running: Running
    completed: dict[str, Any]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Rows) -> Tuned:
    """An undisturbed QLoRA run on the tiny Phi-3."""
    root = hard_root(tmp_path_factory.mktemp("tuned"), models, rows)
    code, running = run(root)
    assert code == 0, (root.folder / "stderr.txt").read_text()
    return Tuned(root, running, running.events[-1])


def test_qlora_lowers_the_loss_on_data_that_it_has_not_seen(tuned: Tuned) -> None:
    assert tuned.completed["event"] == "completed"
    evaluation = tuned.completed["metrics"]["evaluation"]
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"] - 0.5
    assert [e["step"] for e in tuned.running.all("evaluation")] == [0, 3, 6, 9, 10]
    progress = tuned.running.all("progress")
    assert [e["step"] for e in progress] == [2, 4, 6, 8, 10]
    assert progress[-1]["total"] == 10
    assert progress[-1]["epoch"] == 2.0
    assert progress[-1]["eta_seconds"] < progress[0]["eta_seconds"]
    assert all(e["tokens_per_second"] > 0 for e in progress)


def test_the_facts_count_every_token_and_leave_padding_out(tuned: Tuned, rows: Rows) -> None:
    training = tuned.completed["metrics"]["training"]
    train = rows["train"]
    assert training["tokens"] == 2 * int((train["input_ids"] != 0).sum())
    assert training["trained_tokens"] == 2 * int(train["loss_mask"].sum())
    assert tuned.completed["metrics"]["evaluation"]["after"]["tokens"] == int(rows["validation"]["loss_mask"].sum())
    assert (training["steps"], training["epochs"]) == (10, 2.0)
    assert training["last_loss"] < training["first_loss"]
    assert tuned.completed["metrics"]["adapter"]["target_modules"] == sorted(TARGETS["phi3"])
    assert tuned.completed["metrics"]["adapter"]["modules_adapted"] == 8


def test_the_image_holds_the_adapter_the_tokenizer_the_card_and_the_metrics(tuned: Tuned) -> None:
    image = open_image(tuned.completed["image"])
    assert tuned.root.tags == {f"run-{IDENTITY[:12]}": image.digest}
    assert image.digest == tuned.completed["digest"]
    assert image.annotations["sh.kaito.model.name"] == "tiny"
    assert image.annotations["io.kaito-flows.identity"] == IDENTITY
    assert read_file(image, "data/tokenizer_config.json")
    metrics = json.loads(read_file(image, "data/metrics.json"))
    history = [json.loads(line) for line in (tuned.root.results / "history.jsonl").read_text().splitlines()]
    assert metrics["history"] == history
    assert [e["step"] for e in history if e["event"] == "progress"] == [2, 4, 6, 8, 10]
    tensors = load_tensors(read_file(image, "data/adapter_model.safetensors"))
    assert len(tensors) == 16
    assert all(t.dtype == torch.float32 and bool(t.any()) for t in tensors.values())


def test_the_model_card_has_front_matter_and_no_machine_in_it(tuned: Tuned) -> None:
    image = open_image(tuned.completed["image"])
    card = read_file(image, "data/README.md").decode()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "tests/tiny"
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert "# tiny" in body
    assert "cd" * 32 in body
    assert f"{tuned.completed['metrics']['evaluation']['after']['loss']:.4f}" in body
    for name in ("README.md", "adapter_config.json", "metrics.json"):
        assert str(tuned.root.folder) not in read_file(image, f"data/{name}").decode()


def test_peft_loads_the_adapter_and_it_is_the_one_that_was_measured(
    tuned: Tuned, models: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(read_file(open_image(tuned.completed["image"]), f"data/{name}"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tests/tiny"
    assert config["target_modules"] == sorted(TARGETS["phi3"])
    assert type(config["lora_alpha"]) is int, "vLLM refuses other numbers"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["phi3"]), str(tmp_path))
    ids = torch.tensor([[3, 100, 50, 4]])
    with torch.no_grad():
        tuned_logits = model(ids).logits[0, -1]
        with model.disable_adapter():
            base_logits = model(ids).logits[0, -1]
    # 100 % 8 is 4: the answer in the data is token 9.
    assert tuned_logits.log_softmax(-1)[5:13].exp().sum() > 2 * base_logits.log_softmax(-1)[5:13].exp().sum()


def test_checkpoints_are_gone_when_the_image_is_published(tuned: Tuned) -> None:
    assert tuned.root.checkpoints == []
    timings = json.loads((tuned.root.results / "timings.json").read_text())
    assert timings["tokens_per_second"] > 0
    assert tuned.completed["timings"] == timings


def test_the_run_tells_its_first_step_its_learning_rate_and_its_peaks(tuned: Tuned) -> None:
    timings = tuned.completed["timings"]
    [first] = tuned.running.all("first-step")
    names = [told["event"] for told in tuned.running.events]
    assert names.index("first-step") < names.index("progress")
    assert first["seconds"] == timings["first_step_seconds"]
    stages = sum(timings[f"{stage}_seconds"] for stage in ("read", "load"))
    assert stages < timings["first_step_seconds"] < stages + timings["train_seconds"] + 60
    assert 50e6 < timings["peak_host_bytes_loading"] <= timings["peak_host_bytes"] < 4e9
    rates = [told["learning_rate"] for told in tuned.running.all("progress")]
    assert rates[0] == 0.01
    assert rates == sorted(rates, reverse=True)


def test_sample_answers_are_told_and_the_image_has_none_of_the_data(tuned: Tuned) -> None:
    [told] = tuned.running.all("samples")
    [sample] = told["samples"]
    assert (sample["messages"], sample["expected"]) == (SAMPLES[0]["messages"], "t9 t9")
    assert sample["base"] != sample["tuned"]
    image = open_image(tuned.completed["image"])
    for name in ("metrics.json", "README.md"):
        assert "t100 t50" not in read_file(image, f"data/{name}").decode()


def test_the_same_job_again_trains_nothing(tuned: Tuned) -> None:
    code, running = run(tuned.root)
    assert code == 0
    assert [e["event"] for e in running.events] == ["completed"]
    assert {k: running.events[0][k] for k in ("image", "digest", "metrics")} == {
        k: tuned.completed[k] for k in ("image", "digest", "metrics")
    }


def test_another_identity_under_the_same_tag_is_trained_anew(tuned: Tuned) -> None:
    job = json.loads(tuned.root.job.read_text())
    try:
        tuned.root.change_job(identity="ef" * 32, dataset="oci:/nowhere:dataset")
        code, running = run(tuned.root)
    finally:
        tuned.root.change_job(**job)
    # It got as far as the dataset, which is not there.
    assert code == 17
    assert running.events[-1]["code"] == "image-not-found"


def test_killed_in_mid_training_it_ends_with_the_same_bytes(
    tuned: Tuned, models: dict[str, Path], rows: Rows, tmp_path: Path
) -> None:
    root = hard_root(tmp_path, models, rows)
    running = start(root)
    running.wait_for("checkpoint", 4)
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    # What a kill in the middle of writing leaves behind.
    half = root.results / "checkpoints/.step-000099"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    code, again = run(root)
    assert code == 0
    [resumed] = again.all("resumed")
    assert resumed["step"] >= 4
    assert min(e["step"] for e in again.all("progress")) > 4
    assert adapter_hash(root) == adapter_hash(tuned.root)
    assert again.events[-1]["digest"] == tuned.completed["digest"]
    assert (root.results / "history.jsonl").read_bytes() == (tuned.root.results / "history.jsonl").read_bytes()


def test_sigterm_saves_a_checkpoint_and_the_next_run_ends_with_the_same_bytes(
    tuned: Tuned, models: dict[str, Path], rows: Rows, tmp_path: Path
) -> None:
    root = hard_root(tmp_path, models, rows)
    running = start(root)
    running.wait_for("progress", 2)
    assert running.end(signal.SIGTERM) == 143
    failed = running.events[-1]
    assert (failed["event"], failed["code"]) == ("failed", "preempted")
    step = running.all("checkpoint")[-1]["step"]
    assert root.checkpoints[-1] == f"step-{step:06d}"
    assert f"step {step} of 10" in failed["message"]
    code, again = run(root)
    assert code == 0
    assert again.all("resumed") == [{"event": "resumed", "step": step}]
    assert again.events[-1]["digest"] == tuned.completed["digest"]


def test_lora_on_llama_without_held_out_data_is_published_without_an_evaluation(
    models: dict[str, Path], rows: Rows, tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path / "data", {"train": rows["train"]})
    config = make_config("lora", "llama", gradient_checkpointing=True, torch_dtype="bfloat16", save_strategy="no")
    root = make_root(tmp_path / "root", models["llama"], dataset, config, method="lora")
    code, running = run(root)
    assert code == 0, (root.folder / "stderr.txt").read_text()
    metrics = running.events[-1]["metrics"]
    assert metrics["evaluation"] == {"before": None, "after": None}
    assert metrics["training"]["last_loss"] < metrics["training"]["first_loss"] - 0.5
    assert metrics["adapter"]["modules_adapted"] == 14
    assert running.all("evaluation") == []
    assert len(running.all("checkpoint")) == 5, "the pipeline keeps its own checkpoints"


def test_an_adapter_that_learned_nothing_is_not_tagged(models: dict[str, Path], rows: Rows, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", rows)
    config = make_config("qlora", "phi3", learning_rate=0.0, max_steps=2)
    root = make_root(tmp_path / "root", models["phi3"], dataset, config)
    code, running = run(root)
    assert code == 16
    assert running.events[-1]["code"] == "unproven-adapter"
    assert "8 of 8 modules" in running.events[-1]["message"]
    assert root.tags == {}


def test_too_little_memory_is_said_with_the_settings_that_matter(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    weights = tmp_path_factory.mktemp("long")
    length = 32768
    make_model("llama", weights, max_position_embeddings=length)
    document = {
        "input_ids": np.full((1, length), 9, np.int32),
        "loss_mask": np.ones((1, length), np.uint8),
        "position_ids": np.arange(length, dtype=np.int32)[None],
    }
    dataset = make_dataset(tmp_path / "data", {"train": document})
    # The attention scores of one row are 16 GiB.
    config = make_config("lora", "llama", attn_implementation="eager", max_length=length)
    root = make_root(tmp_path / "root", weights, dataset, config, method="lora")
    code, running = run(root, address_space=4 << 30)
    assert code == 13, (root.folder / "stderr.txt").read_text()
    failed = running.events[-1]
    assert failed["code"] == "out-of-memory"
    assert f"max_length {length}" in failed["message"]
    assert "gradient_checkpointing" in failed["hint"]
