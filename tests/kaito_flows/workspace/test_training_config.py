"""`training_config.yaml`: each key honoured or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from kaito_flows.errors import ConfigError, WorkspaceError
from kaito_flows.workspace import TrainingConfig


def resolve(method: str = "qlora", **sections: Any) -> TrainingConfig:
    return TrainingConfig.resolve(method, yaml.safe_dump({"training_config": sections}))


def faults(method: str = "qlora", **sections: Any) -> str:
    with pytest.raises(WorkspaceError) as caught:
        resolve(method, **sections)
    return "\n".join(map(str, caught.value.faults))


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_without_a_file_the_defaults_of_the_method_are_whole(method: str) -> None:
    config = TrainingConfig.resolve(method, None)
    assert config.QuantizationConfig.load_in_4bit is (method == "qlora")
    assert config.LoraConfig.target_modules == ["all-linear"]


def test_what_is_written_is_laid_over_the_defaults() -> None:
    config = resolve(LoraConfig={"r": 4}, TrainingArguments={"max_steps": 7})
    assert (config.LoraConfig.r, config.TrainingArguments.max_steps) == (4, 7)
    default = TrainingConfig.resolve("qlora", None)
    assert config.LoraConfig.lora_dropout == default.LoraConfig.lora_dropout


def test_older_names_of_transformers_and_trl_mean_the_same() -> None:
    arguments = resolve(TrainingArguments={"evaluation_strategy": "epoch", "max_seq_length": 64}).TrainingArguments
    assert (arguments.eval_strategy, arguments.max_length) == ("epoch", 64)


def test_as_yaml_it_reads_back_the_same() -> None:
    config = resolve(LoraConfig={"r": 4})
    assert TrainingConfig.resolve("qlora", config.as_yaml()) == config


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"LoraConf": {}}, 'Unrecognized section: LoraConf (did you mean "LoraConfig"?)'),
        ({"LoraConfig": {"rr": 8}}, 'LoraConfig.rr: unknown key "rr"'),
        ({"TrainingArguments": {"neftune_noise_alpha": 5}}, 'unknown key "neftune_noise_alpha"'),
        ({"TrainingArguments": {"learning_rat": 1}}, 'did you mean "learning_rate"?'),
        ({"TrainingArguments": {"learning_rate": "fast"}}, "TrainingArguments.learning_rate"),
        ({"TrainingArguments": {"output_dir": "/tmp/x"}}, "results are written to /mnt/results"),
        ({"TrainingArguments": []}, "TrainingArguments: Input should be"),
        ({"LoraConfig": {"bias": "all"}}, "LoraConfig.bias: 'all' is not 'none'"),
        ({"LoraConfig": {"r": 0}}, "greater than or equal to 1"),
        ({"QuantizationConfig": {"load_in_8bit": True}}, "load_in_8bit"),
        ({"QuantizationConfig": {"load_in_4bit": False}}, "For method 'qlora', load_in_4bit must be true"),
        ({"DatasetConfig": {"train_test_split": 0}}, "greater than 0"),
        ({"TrainingArguments": {"load_best_model_at_end": True}}, "needs evaluations to choose among"),
        (
            {
                "TrainingArguments": {"load_best_model_at_end": True, "eval_strategy": "epoch"},
                "DatasetConfig": {"train_test_split": 1},
            },
            "nothing is held out",
        ),
        ({"TrainingArguments": {"early_stopping_patience": 2}}, "needs the best adapter to be kept"),
        ({"TrainingArguments": {"early_stopping_patience": 0}}, "greater than or equal to 1"),
        ({"TrainingArguments": {"greater_is_better": True}}, "greater_is_better: True is not False"),
        ({"TrainingArguments": {"metric_for_best_model": "eval_bleu"}}, "metric_for_best_model: 'eval_bleu' is not"),
        ({"ModelConfig": {"trust_remote_code": True}}, 'unknown key "trust_remote_code"'),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(sections: dict[str, Any], fault: str) -> None:
    assert fault in faults(**sections)


def test_options_that_nobody_asked_for_leave_the_config_as_it_was() -> None:
    """So that adapters are found which were trained before there was the option."""
    assert "load_best_model_at_end" not in TrainingConfig.resolve("qlora", None).as_yaml()
    asked = {"load_best_model_at_end": True, "eval_strategy": "epoch", "early_stopping_patience": 3}
    config = resolve(TrainingArguments=asked)
    assert config.resolved()["TrainingArguments"].items() >= asked.items()
    assert "early_stopping_threshold" not in config.resolved()["TrainingArguments"]
    assert TrainingConfig.resolve("qlora", config.as_yaml()) == config


def test_lora_does_not_quantise() -> None:
    assert "For method 'lora'" in faults("lora", QuantizationConfig={"load_in_4bit": True})


def test_all_faults_come_at_once() -> None:
    told = faults(LoraConfig={"r": 0, "x": 1}, Data={}, TrainingArguments={"seed": -1})
    assert len(told.splitlines()) == 4


@pytest.mark.parametrize("text", ["- a", "x: 1", "training_config: 3", "", "a: ["])
def test_a_text_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid-training-config"):
        TrainingConfig.resolve("qlora", text)
