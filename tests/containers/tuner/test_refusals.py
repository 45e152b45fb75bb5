"""Bad input: each fault has its exit code and one line that names the place, and nothing is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save as save_arrays

from kaito_flows.containers.tuner.data import load_dataset, unpack
from kaito_flows.containers.tuner.job import read_config
from kaito_flows.containers.tuner.model import adapt, load_base
from kaito_flows.errors import ConfigError, DatasetError, WeightsError
from kaito_flows.oci.images import open_image

from .conftest import VOCABULARY, Root, Rows, make_config, make_dataset, make_root, run

Change = Callable[[Root], None]


def job(**changed: Any) -> Change:
    return lambda root: root.change_job(**changed)


def config(section: str, key: str, value: Any) -> Change:
    def change(root: Root) -> None:
        made = make_config("qlora", "phi3")
        made[section][key] = value
        root.write_config(made)

    return change


def without(section: str, key: str) -> Change:
    def change(root: Root) -> None:
        made = make_config("qlora", "phi3")
        del made[section][key]
        root.write_config(made)

    return change


@pytest.fixture
def root(tmp_path: Path, models: dict[str, Path], rows: Rows) -> Root:
    dataset = make_dataset(tmp_path / "data", rows)
    return make_root(tmp_path / "root", models["phi3"], dataset, make_config("qlora", "phi3"))


def refused(root: Root) -> tuple[int, dict[str, Any]]:
    code, running = run(root)
    failed = running.events[-1]
    assert failed["event"] == "failed"
    assert len(running.all("failed")) == 1
    assert failed["message"]
    assert "\n" not in failed["message"]
    assert root.tags == {}
    return code, failed


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (job(indentity="x"), "job.json", 'unknown key "indentity"'),
        (job(version=2), "job.json: version", "must be 1"),
        (job(method="dora"), "job.json: method", '"qlora"'),
        (job(identity="xyz"), "identity", "64 hex"),
        (job(model={"preset": "p", "id": "i"}), "job.json: model.revision", "is required"),
        (job(root="relative"), "root", "absolute"),
    ],
)
def test_a_bad_job_file_is_refused(root: Root, change: Change, place: str, message: str) -> None:
    change(root)
    code, failed = refused(root)
    assert code == 2
    assert failed["place"].endswith(place)
    assert message in failed["message"]


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (config("TrainingArguments", "learning_rte", 1.0), "TrainingArguments", 'unknown key "learning_rte"'),
        (without("LoraConfig", "r"), "LoraConfig.r", "is required"),
        (config("LoraConfig", "r", "8"), "LoraConfig.r", "must be an integer"),
        (config("LoraConfig", "r", 0), "LoraConfig.r", "at least 1"),
        (config("LoraConfig", "target_modules", "q_proj"), "LoraConfig.target_modules", "must be a list"),
        (config("LoraConfig", "target_modules", []), "LoraConfig.target_modules", "no module"),
        (config("LoraConfig", "lora_dropout", 1.0), "LoraConfig.lora_dropout", "not including 1"),
        (config("QuantizationConfig", "load_in_8bit", True), "QuantizationConfig.load_in_8bit", "must be false"),
        (config("QuantizationConfig", "load_in_4bit", False), "QuantizationConfig.load_in_4bit", "'qlora'"),
        (config("TrainingArguments", "learning_rate", "5e-4"), "TrainingArguments.learning_rate", "a number"),
        (config("TrainingArguments", "learning_rate", float("nan")), "TrainingArguments.learning_rate", "nan"),
        (config("TrainingArguments", "max_steps", 0), "TrainingArguments.max_steps", "-1"),
        (config("TrainingArguments", "optim", "sgd"), "TrainingArguments.optim", "adamw_torch"),
        (config("TrainingArguments", "load_best_model_at_end", True), "load_best_model_at_end", "needs evaluations"),
        (config("TrainingArguments", "early_stopping_patience", 3), "early_stopping_patience", "best adapter"),
        (config("TrainingArguments", "packing", 1), "TrainingArguments.packing", "true or false"),
        (lambda root: root.write_config("training_config: [1, 2"), "training_config.yaml", "not YAML"),
        (lambda root: root.write_config("a: 1"), "training_config.yaml", "'training_config'"),
        (lambda root: root.write_config("training_config: 3"), "training_config.yaml", "mapping"),
    ],
)
def test_a_bad_training_config_is_refused_by_the_path_of_its_key(
    root: Root, change: Change, place: str, message: str
) -> None:
    change(root)
    code, failed = refused(root)
    assert code == 10
    assert failed["place"].endswith(place)
    assert message in failed["message"]


def test_a_missing_training_config_is_refused(root: Root) -> None:
    (root.folder / "mnt/config/training_config.yaml").unlink()
    code, failed = refused(root)
    assert (code, failed["code"]) == (10, "invalid-training-config")


def test_a_target_that_matches_nothing_is_refused_with_what_there_is(root: Root) -> None:
    root.write_config(make_config("qlora", "phi3", target_modules=["o_proj", "q_proj"]))
    settings = read_config(root.folder / "mnt/config/training_config.yaml", "qlora")
    with pytest.raises(ConfigError, match="'q_proj' matches no linear layer") as caught:
        adapt(load_base(root.folder / "workspace/weights", settings), "tests/tiny", settings)
    assert caught.value.job_exit_code == 10
    assert caught.value.place == "training_config.yaml: LoraConfig.target_modules"
    assert caught.value.hint == "the model has down_proj, gate_up_proj, o_proj, qkv_proj"


def damage(rows: Rows, **changed: np.ndarray | None) -> bytes:
    arrays = {**rows["train"], **changed}
    return save_arrays({name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.safetensors", lambda rows: None, "is missing"),
        ("train.safetensors", lambda rows: b"\0" * 100, "cannot be read"),
        ("train.safetensors", lambda rows: damage(rows, loss_mask=None), "no tensor 'loss_mask'"),
        ("train.safetensors", lambda rows: damage(rows, loss_mask=rows["train"]["loss_mask"][:-1]), "shapes differ"),
        ("train.safetensors", lambda rows: damage(rows, loss_mask=rows["train"]["loss_mask"] * 0), "is learned"),
        ("train.safetensors", lambda rows: damage(rows, position_ids=rows["train"]["position_ids"] + 1), "count up"),
        ("train.safetensors", lambda rows: damage(rows, input_ids=rows["train"]["input_ids"] * 1.0), "integers"),
        ("dataset.json", lambda rows: None, "is missing"),
        ("dataset.json", lambda rows: b"{}", "facts"),
        ("dataset.json", lambda rows: b'{"format_version": 2, "pad_token_id": 0}', "version 2"),
    ],
)
def test_a_damaged_dataset_is_refused(
    tmp_path: Path, rows: Rows, name: str, content: Callable[[Rows], bytes | None], message: str
) -> None:
    unpack(open_image(make_dataset(tmp_path / "registry", rows, **{name: content(rows)})), tmp_path / "data")
    with pytest.raises(DatasetError) as caught:
        load_dataset(tmp_path / "data")
    assert (caught.value.job_exit_code, caught.value.code, caught.value.place) == (11, "dataset-damaged", name)
    assert message in caught.value.message


def test_a_damaged_dataset_ends_the_program_before_a_model_is_loaded(root: Root, tmp_path: Path, rows: Rows) -> None:
    root.change_job(dataset=make_dataset(tmp_path / "data", rows, **{"train.safetensors": b"damaged"}))
    code, failed = refused(root)
    assert (code, failed["code"], failed["place"]) == (11, "dataset-damaged", "train.safetensors")


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path, rows: Rows, token: int) -> None:
    ids = rows["train"]["input_ids"].copy()
    ids[3, 5] = token
    image = make_dataset(tmp_path / "registry", rows, **{"train.safetensors": damage(rows, input_ids=ids)})
    unpack(open_image(image), tmp_path / "data")
    with pytest.raises(DatasetError, match=f"token id {token}") as caught:
        load_dataset(tmp_path / "data").train.check_against(VOCABULARY, None, place="train.safetensors")
    assert (caught.value.job_exit_code, caught.value.code) == (11, "dataset-misfit")


def test_a_document_longer_than_the_models_context_is_refused(tmp_path: Path, rows: Rows) -> None:
    unpack(open_image(make_dataset(tmp_path / "registry", rows)), tmp_path / "data")
    train = load_dataset(tmp_path / "data").train
    longest = int(rows["train"]["position_ids"].max()) + 1
    train.check_against(VOCABULARY, longest, place="train.safetensors")
    with pytest.raises(DatasetError, match=f"{longest} tokens"):
        train.check_against(VOCABULARY, longest - 1, place="train.safetensors")


def test_a_dataset_image_that_is_not_there_is_refused(root: Root) -> None:
    root.change_job(dataset="oci:/nowhere:dataset")
    code, failed = refused(root)
    assert (code, failed["code"]) == (17, "image-not-found")


@pytest.mark.parametrize("left", [[], ["config.json"], ["config.json", "pytorch_model.bin"]])
def test_weights_that_are_not_there_or_not_safetensors_are_refused(root: Root, left: list[str]) -> None:
    weights = root.folder / "workspace/weights"
    model = weights.resolve()
    weights.unlink()
    weights.mkdir()
    for name in left:
        (weights / name).write_bytes((model / name).read_bytes() if (model / name).exists() else b"pickle")
    code, failed = refused(root)
    assert (code, failed["code"]) == (12, "weights-missing")


def test_weights_that_lack_tensors_are_refused(root: Root) -> None:
    weights = root.folder / "workspace/weights"
    model = weights.resolve()
    weights.unlink()
    weights.mkdir()
    settings = json.loads((model / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    (weights / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="missing") as caught:
        load_base(weights, read_config(root.folder / "mnt/config/training_config.yaml", "qlora"))
    assert (caught.value.job_exit_code, caught.value.code) == (12, "weights-unreadable")


def test_a_config_is_read_as_yaml_writes_it(root: Root) -> None:
    """The fixture's own config is a good one: what is refused above is refused for what was changed."""
    path = root.folder / "mnt/config/training_config.yaml"
    read = read_config(path, "qlora")
    written = yaml.safe_load(path.read_text())["training_config"]
    assert read.LoraConfig.target_modules == tuple(written["LoraConfig"]["target_modules"])
    assert read.TrainingArguments.learning_rate == written["TrainingArguments"]["learning_rate"]
