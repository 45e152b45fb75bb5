"""Every key of `training_config.yaml` changes what is done, or there is nothing about it to change; none is ignored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from transformers import BitsAndBytesConfig

from kaito_flows.containers.tuner import evaluation
from kaito_flows.containers.tuner import job as tuner_job
from kaito_flows.containers.tuner.data import Batch, Dataset
from kaito_flows.containers.tuner.job import TrainingConfig, read_config
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import adapter_files
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.training import train
from kaito_flows.dataset.prepare import DatasetParameters
from kaito_flows.errors import WorkspaceError
from kaito_flows.workspace import TrainingConfig as Resolved

from .conftest import IDENTITY, adapted_model, make_config

# What the loop does with each key. Beside the key and its other value: what must be so for it to matter.
OF_THE_LOOP: dict[str, tuple[Any, dict[str, Any]]] = {
    "ModelConfig.torch_dtype": ("bfloat16", {}),
    "ModelConfig.attn_implementation": ("eager", {}),
    "QuantizationConfig.load_in_4bit": (False, {}),
    "QuantizationConfig.bnb_4bit_quant_type": ("fp4", {}),
    "QuantizationConfig.bnb_4bit_compute_dtype": ("bfloat16", {}),
    "QuantizationConfig.bnb_4bit_use_double_quant": (False, {}),
    "LoraConfig.r": (4, {}),
    "LoraConfig.lora_alpha": (8, {}),
    "LoraConfig.lora_dropout": (0.1, {}),
    "LoraConfig.target_modules": (["qkv_proj", "o_proj"], {}),
    "LoraConfig.use_rslora": (True, {}),
    "LoraConfig.use_dora": (True, {}),
    "TrainingArguments.num_train_epochs": (1.0, {}),
    "TrainingArguments.max_steps": (3, {}),
    "TrainingArguments.per_device_train_batch_size": (3, {}),
    "TrainingArguments.per_device_eval_batch_size": (1, {}),
    "TrainingArguments.gradient_accumulation_steps": (3, {}),
    "TrainingArguments.learning_rate": (0.005, {}),
    "TrainingArguments.lr_scheduler_type": ("linear", {}),
    "TrainingArguments.warmup_ratio": (0.4, {"warmup_steps": 0}),
    "TrainingArguments.warmup_steps": (2, {}),
    "TrainingArguments.weight_decay": (0.3, {}),
    "TrainingArguments.adam_beta1": (0.8, {}),
    "TrainingArguments.adam_beta2": (0.9, {}),
    "TrainingArguments.adam_epsilon": (1e-3, {}),
    "TrainingArguments.max_grad_norm": (0.1, {}),
    "TrainingArguments.logging_steps": (1, {}),
    "TrainingArguments.save_strategy": ("epoch", {}),
    "TrainingArguments.save_steps": (3, {}),
    "TrainingArguments.save_total_limit": (4, {}),
    "TrainingArguments.eval_strategy": ("epoch", {}),
    "TrainingArguments.eval_steps": (2, {"eval_strategy": "steps"}),
    "TrainingArguments.gradient_checkpointing": (True, {}),
    "TrainingArguments.seed": (8, {}),
    "TrainingArguments.load_best_model_at_end": (True, {"eval_strategy": "steps", "eval_steps": 1}),
    "TrainingArguments.early_stopping_patience": (1, {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_threshold": 9.0,
    }),
    "TrainingArguments.early_stopping_threshold": (9.0, {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2,
    }),
    "DatasetConfig.shuffle_dataset": (False, {}),
}  # fmt: skip

# What the preparation of the dataset does.
OF_THE_DATASET: dict[str, Any] = {
    "TrainingArguments.max_length": 32,
    "TrainingArguments.packing": False,
    "DatasetConfig.shuffle_dataset": False,
    "DatasetConfig.shuffle_seed": 43,
    "DatasetConfig.train_test_split": 0.8,
    "DatasetConfig.messages_column": "chat",
    "DatasetConfig.context_column": "question",
    "DatasetConfig.response_column": "answer",
}

# One value alone is taken, and any other is refused.
OF_ONE_VALUE: dict[str, Any] = {
    "ModelConfig.local_files_only": False,
    "ModelConfig.device_map": "cpu",
    "QuantizationConfig.load_in_8bit": True,
    "LoraConfig.bias": "all",
    "TrainingArguments.output_dir": "/mnt/elsewhere",
    "TrainingArguments.optim": "sgd",
    "TrainingArguments.report_to": "wandb",
    "TrainingArguments.greater_is_better": True,
    "TrainingArguments.metric_for_best_model": "eval_accuracy",
}

# Both values mean the same: of masked language models, and of a wrapper that is not used.
OF_NO_MEANING = {"DataCollator.mlm", "TrainingArguments.ddp_find_unused_parameters"}


def keys() -> set[str]:
    sections = {section.name: getattr(tuner_job, section.name) for section in dataclasses.fields(TrainingConfig)}
    return {f"{name}.{key.name}" for name, section in sections.items() for key in dataclasses.fields(section)}


def test_there_is_no_key_of_which_nothing_is_shown() -> None:
    assert keys() == OF_THE_LOOP.keys() | OF_THE_DATASET.keys() | OF_ONE_VALUE.keys() | OF_NO_MEANING
    resolved = {
        f"{section}.{key}"
        for section, model in Resolved.model_fields.items()
        for key in model.annotation.model_fields  # type: ignore[union-attr]
    }
    assert resolved == keys(), "what is resolved is what the tuner reads"


@pytest.mark.parametrize("key", OF_THE_LOOP)
def test_a_key_of_the_loop_changes_what_it_does(
    key: str, models: dict[str, Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, name = key.split(".")
    value, needed = OF_THE_LOOP[key]

    def observed(folder: str, **changed: Any) -> list[Any]:
        config = make_config("qlora", "phi3", **{"max_steps": 6, "save_steps": 2, **changed})
        method = "qlora" if config["QuantizationConfig"]["load_in_4bit"] else "lora"
        if name == "num_train_epochs":
            config["TrainingArguments"]["max_steps"] = -1
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump({"training_config": config}))
        read = read_config(tmp_path / f"{folder}.yaml", method)
        rows: list[int] = []

        def counted(model: Any, batch: Batch, **options: Any) -> torch.Tensor:
            rows.append(batch.tokens)
            return loss_sum(model, batch, **options)

        monkeypatch.setattr(evaluation, "loss_sum", counted)
        adapted = adapted_model(models["phi3"], read)
        state = train(adapted, dataset, read, IDENTITY, tmp_path / folder, Preemption())
        saved = sorted(path.name for path in (tmp_path / folder / "checkpoints").rglob("*"))
        how = (adapted.model.config._attn_implementation, adapted.model.is_gradient_checkpointing)
        return [adapter_files(adapted).weights, state.history, saved, rows, how]

    def changed(value: Any) -> dict[str, Any]:
        # Of two keys with one name, the section's.
        return {**needed, name: value}

    default = {} if name.startswith(("load_best", "early")) else {name: make_config("qlora", "phi3")[section][name]}
    assert observed("changed", **changed(value)) != observed("default", **{**needed, **default})


@pytest.mark.parametrize("key", OF_THE_DATASET)
def test_a_key_of_the_dataset_changes_what_is_prepared(key: str) -> None:
    section, name = key.split(".")
    config = make_config("qlora", "phi3")
    before = DatasetParameters.from_config(config)
    config[section][name] = OF_THE_DATASET[key]
    assert DatasetParameters.from_config(config) != before


@pytest.mark.parametrize("key", OF_ONE_VALUE)
def test_a_key_with_one_value_takes_no_other(key: str) -> None:
    assert f"training_config.yaml: {key}: " in refusal(key, OF_ONE_VALUE[key])


def refusal(key: str, value: Any) -> str:
    section, name = key.split(".")
    text = yaml.safe_dump({"training_config": {section: {name: value}}})
    with pytest.raises(WorkspaceError) as caught:
        Resolved.resolve("qlora", text)
    return "\n".join(map(str, caught.value.faults))


# What KAITO's program takes (0.4 to 0.12): fields of these, of its own sections, and some of TRL's SFTConfig.
KAITOS: dict[str, set[str]] = {
    "ModelConfig": {
        "pretrained_model_name_or_path", "state_dict", "cache_dir", "from_tf", "force_download", "resume_download",
        "proxies", "output_loading_info", "allow_remote_files", "m_revision", "trust_remote_code", "load_in_4bit",
        "load_in_8bit", "chat_template",
    },
    "QuantizationConfig": {
        "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
        "bnb_4bit_quant_storage", "quant_method",
    },
    "LoraConfig": {field.name for field in dataclasses.fields(peft.LoraConfig)},
    "TrainingArguments": {field.name for field in dataclasses.fields(transformers.TrainingArguments)} | {
        "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "neftune_noise_alpha", "eval_packing", "use_liger",
        "completion_only_loss", "assistant_only_loss", "padding_free", "loss_type", "model_init_kwargs",
    },
    "DatasetConfig": set(),
    "DataCollator": {"tokenizer", "mlm_probability", "pad_to_multiple_of", "tf_experimental_compile", "return_tensors"},
}  # fmt: skip


@pytest.mark.parametrize("section", KAITOS)
def test_what_kaito_takes_and_this_does_not_is_refused_by_name_and_all_of_it_at_once(section: str) -> None:
    known = {key.partition(".")[2] for key in keys() if key.startswith(f"{section}.")}
    others = sorted(KAITOS[section] - known)
    text = yaml.safe_dump({"training_config": {section: dict.fromkeys(others, 1)}})
    if not others:
        assert Resolved.resolve("qlora", text)
        return
    with pytest.raises(WorkspaceError) as caught:
        Resolved.resolve("qlora", text)
    told = [str(fault) for fault in caught.value.faults]
    for name in others:
        assert any(f"{section}.{name}: unknown key" in fault for fault in told), name


def test_bitsandbytes_settings_that_are_taken_are_bitsandbytes_own() -> None:
    known = {key.partition(".")[2] for key in keys() if key.startswith("QuantizationConfig.")}
    made = BitsAndBytesConfig(load_in_4bit=True)
    assert all(hasattr(made, name) for name in known)
    assert {key.partition(".")[2] for key in keys() if key.startswith("LoraConfig.")} <= {
        field.name for field in dataclasses.fields(peft.LoraConfig)
    }
