"""The preset files: complete, consistent with themselves, and found by every name that they have."""

from __future__ import annotations

import datetime
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from kaito_flows.errors import PlanError
from kaito_flows.planning.shapes import linear_shapes
from kaito_flows.presets.loader import Preset, Sku, load_preset, load_presets, load_skus, tuning_defaults

PRESETS = load_presets()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_the_counts_are_those_of_the_shape(preset: Preset) -> None:
    shape, shapes = preset.architecture, linear_shapes(preset.architecture)
    each = sum(shapes[name][0] * shapes[name][1] for name in preset.linear_modules)
    assert shape.layers * each == preset.parameters.linear
    tables = 1 if shape.tie_embeddings else 2
    assert tables * shape.vocab_size * shape.hidden_size == preset.parameters.embedding
    # norms and biases are what is left
    rest = preset.parameters.total - preset.parameters.linear - preset.parameters.embedding
    assert 0 < rest < 0.002 * preset.parameters.total


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_a_preset_is_found_by_every_name_it_has(preset: Preset) -> None:
    for name in (preset.name, *preset.aliases, *(alias.upper() for alias in preset.aliases)):
        assert load_preset(name) == preset


def test_no_two_presets_share_a_name() -> None:
    names = [name.lower() for preset in PRESETS for name in (preset.name, *preset.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("phi-3-mini-128k-instruct", "phi-3-mini-128k-instruct"),
        ("phi3mini128kinst", "phi-3-mini-128k-instruct"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini-4k-instruct"),
        ("mistral-7b-v0.3", "mistral-7b"),
        ("phi-4", "phi-4"),
        ("qwen2.5-coder-32b-instruct", "qwen2.5-coder-32b-instruct"),
        ("falcon-7b", "falcon-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
    ],
)
def test_kaitos_names_are_known(name: str, preset: str) -> None:
    assert load_preset(name).name == preset


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("phi-3-mini-128k-instrcut", "did you mean 'phi-3-mini-128k-instruct'?"),
        ("Phi3Mini128k", "did you mean 'phi-3-mini-128k-instruct'?"),
        ("gpt-17", "known are "),
        ("", "known are "),
        ("../skus", "known are "),
        ("..", "known are "),
        ("phi-4\n", "did you mean 'phi-4'?"),
    ],
)
def test_an_unknown_name_hears_of_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_preset(name)
    assert caught.value.code == "unknown-preset"
    assert caught.value.place == "tuning.preset.name"
    assert caught.value.hint.startswith(hint)


def test_a_key_that_no_preset_has_is_refused() -> None:
    raw = load_preset("phi-4").model_dump()
    assert Preset.model_validate(raw) == load_preset("phi-4")
    with pytest.raises(ValidationError, match="colour"):
        Preset.model_validate({**raw, "colour": "blue"})
    with pytest.raises(ValidationError, match="sha256"):
        Preset.model_validate({**raw, "source": {"kind": "hub", "repo": "a/b", "revision": "main", "sha256": "0"}})
    with pytest.raises(ValidationError, match="which linear_modules lacks"):
        Preset.model_validate({**raw, "fused_modules": {"q_proj": "attention"}})


def test_phi3_says_what_its_fused_modules_stand_for() -> None:
    assert load_preset("phi-3-mini-4k-instruct").fused_modules == {
        "q_proj": "qkv_proj",
        "k_proj": "qkv_proj",
        "v_proj": "qkv_proj",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
    }


def sku(name: str) -> Sku:
    return next(sku for sku in load_skus() if sku.name == name)


def test_a_price_has_its_region_and_date() -> None:
    a100 = sku("Standard_NC24ads_A100_v4")
    assert (a100.price_usd_hour, a100.price_region, a100.price_date) == (3.673, "eastus", datetime.date(2026, 6, 18))
    assert (a100.gpus, a100.gpu_memory_gib, a100.bf16) == (1, 80, True)


def test_the_sizes_of_old_examples_are_there_and_marked() -> None:
    assert sku("Standard_NC12s_v3").retires == datetime.date(2025, 9, 30)
    assert not sku("Standard_NC6s_v3").bf16
    assert not sku("Standard_NC64as_T4_v3").bf16


def test_bf16_goes_with_the_compute_capability() -> None:
    assert len({s.name for s in load_skus()}) == len(load_skus()) == 29
    for size in load_skus():
        assert size.bf16 == (size.compute_capability >= 8.0), size.name
        assert size.tflops or not size.bf16, size.name


def test_both_methods_have_every_key_and_differ_in_what_they_quantise() -> None:
    qlora, lora = tuning_defaults("qlora"), tuning_defaults("lora")
    assert {name: set(section) for name, section in qlora.items()} == {
        name: set(section) for name, section in lora.items()
    }
    differing = {(name, key) for name, section in qlora.items() for key in section if section[key] != lora[name][key]}
    assert differing == {("QuantizationConfig", "load_in_4bit")}
    assert qlora["QuantizationConfig"]["load_in_4bit"] is True
    assert qlora["TrainingArguments"]["eval_strategy"] == "no"  # not YAML's false


def test_the_defaults_are_a_resolved_config() -> None:
    from kaito_flows.workspace.training_config import TrainingConfig

    for method in ("lora", "qlora"):
        resolved = TrainingConfig.resolve(method, None)
        assert TrainingConfig.model_validate(yaml.safe_load(resolved.as_yaml())["training_config"]) == resolved


def test_defaults_that_a_caller_changes_stay_as_they_were() -> None:
    tuning_defaults("qlora")["LoraConfig"]["target_modules"].append("lm_head")
    assert tuning_defaults("qlora")["LoraConfig"]["target_modules"] == ["all-linear"]


@pytest.mark.parametrize("method", ["QLoRA", "full", "", "../skus"])
def test_an_unknown_method_is_refused(method: str) -> None:
    with pytest.raises(PlanError) as caught:
        tuning_defaults(method)
    assert caught.value.code == "unknown-method"


def test_reading_one_preset_reads_one_file_and_nothing_heavy() -> None:
    program = """
import sys, time
from kaito_flows.presets import loader
read = []
original = loader._read
loader._read = lambda file: (read.append(file.name), original(file))[1]
loader.load_preset("phi-3-mini-128k-instruct")
assert read == ["phi-3-mini-128k-instruct.yaml"], read
started = time.perf_counter()
loader.load_presets()
assert time.perf_counter() - started < 0.5
assert not {"torch", "transformers", "prefect", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
