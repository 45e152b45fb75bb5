"""KAITO's `training_config.yaml`: six sections, each key honoured or refused by name.

A user's file need not be whole: what it leaves out comes from `presets/tuning/<method>.yaml`. The resolved config is
what the tuner reads, and is part of the run's identity. It has every key but those of options that nobody asked for:
so an adapter that was trained before an option was known is still found by its identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from kaito_flows.errors import ConfigError, Fault, WorkspaceError
from kaito_flows.presets.loader import tuning_defaults
from kaito_flows.workspace.faults import faults_of, nearest

CONFIG_KEY = "training_config.yaml"
ROOT_KEY = "training_config"

DType = Literal["bfloat16", "float16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ModelConfig(_Section):
    """How the base model is loaded. Weights always come from the model folder, on the one device that the job has."""

    torch_dtype: DType
    local_files_only: Literal[True]
    device_map: Literal["auto"]
    attn_implementation: Literal["sdpa", "eager"]


class QuantizationConfig(_Section):
    """bitsandbytes' settings, as transformers' BitsAndBytesConfig names them."""

    load_in_4bit: bool
    load_in_8bit: Literal[False]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: DType
    bnb_4bit_use_double_quant: bool


class LoraConfig(_Section):
    """PEFT's settings, as its LoraConfig names them."""

    r: int = Field(ge=1, le=1024)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: list[str] = Field(min_length=1)
    bias: Literal["none"]
    use_rslora: bool
    use_dora: bool


class TrainingArguments(_Section):
    """The settings of the training loop, as transformers and TRL name them.

    The last five are options; what is patience and threshold here are arguments of transformers' EarlyStoppingCallback.
    """

    output_dir: str
    num_train_epochs: float = Field(gt=0)
    max_steps: int = Field(ge=-1)
    per_device_train_batch_size: int = Field(ge=1)
    per_device_eval_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    learning_rate: float = Field(ge=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: float = Field(ge=0, lt=1)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    adam_beta1: float = Field(ge=0, lt=1)
    adam_beta2: float = Field(ge=0, lt=1)
    adam_epsilon: float = Field(gt=0)
    max_grad_norm: float = Field(ge=0)
    optim: Literal["adamw_torch"]
    logging_steps: int = Field(ge=1)
    save_strategy: Literal["steps", "epoch", "no"]
    save_steps: int = Field(ge=1)
    save_total_limit: int = Field(ge=1)
    eval_strategy: Literal["steps", "epoch", "no"] = Field(
        validation_alias=AliasChoices("eval_strategy", "evaluation_strategy")
    )
    eval_steps: int = Field(ge=1)
    gradient_checkpointing: bool
    seed: int = Field(ge=0)
    max_length: int = Field(ge=8, validation_alias=AliasChoices("max_length", "max_seq_length"))
    packing: bool
    ddp_find_unused_parameters: bool
    report_to: Literal["none"]
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["loss", "eval_loss"] | None = None
    greater_is_better: Literal[False] | None = None
    early_stopping_patience: int | None = Field(default=None, ge=1)
    early_stopping_threshold: float = Field(default=0.0, ge=0)


class DatasetConfig(_Section):
    """How the data is read and split; `train_test_split` is the share that is trained on, 1 holds nothing out."""

    shuffle_dataset: bool
    shuffle_seed: int = Field(ge=0)
    train_test_split: float = Field(gt=0, le=1)
    messages_column: str | None
    context_column: str | None
    response_column: str | None


class DataCollator(_Section):
    """KAITO's collator section. The models are causal, so `mlm` says nothing to them; both values mean the same."""

    mlm: bool


class TrainingConfig(_Section):
    """The resolved config."""

    ModelConfig: ModelConfig
    QuantizationConfig: QuantizationConfig
    LoraConfig: LoraConfig
    TrainingArguments: TrainingArguments
    DatasetConfig: DatasetConfig
    DataCollator: DataCollator

    def as_yaml(self) -> str:
        """The config as `training_config.yaml` holds it."""
        return yaml.safe_dump({ROOT_KEY: self.resolved()}, sort_keys=False)

    def resolved(self) -> dict[str, Any]:
        """The config as plain values, section by section, without options that nobody asked for."""
        return self.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def resolve(cls, method: str, text: str | None, *, place: str = CONFIG_KEY) -> TrainingConfig:
        """Lay the user's `training_config.yaml` over the defaults of the method.

        Raises:
            WorkspaceError: with every fault, each with its path.
            ConfigError: the text is not YAML, or not a mapping.
        """
        written = _sections(text, place) if text is not None else {}
        defaults = tuning_defaults(method)
        merged: dict[str, Any] = {}
        for section, values in defaults.items():
            given = written.get(section)
            given = {} if given is None else given  # `LoraConfig:` with nothing behind it
            merged[section] = {**values, **_canonical(given)} if isinstance(given, Mapping) else given
        faults = list(_rules(method, {**written, **merged}, place))
        try:
            config = cls.model_validate(merged)
        except ValidationError as exc:
            faults = [*faults_of(exc, cls, prefix=f"{place}: "), *faults]
        if faults:
            raise WorkspaceError(faults)
        return config


_OLD_NAMES = {"evaluation_strategy": "eval_strategy", "max_seq_length": "max_length", "dtype": "torch_dtype"}


def _canonical(section: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {_OLD_NAMES.get(k, k): v for k, v in section.items()}
    # "all-linear" is PEFT's word for every linear layer but the head.
    if isinstance(renamed.get("target_modules"), str):
        renamed["target_modules"] = [renamed["target_modules"]]
    return renamed


def _sections(text: str, place: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"not YAML: {exc}", place=place) from exc
    root = loaded.get(ROOT_KEY) if isinstance(loaded, dict) else None
    if not isinstance(root, dict):
        raise ConfigError(f"the root must be a mapping {ROOT_KEY!r}", place=place, hint=f"begin with `{ROOT_KEY}:`")
    return root


def _rules(method: str, config: Mapping[str, Any], place: str) -> Iterator[Fault]:
    """KAITO's rules on the config, by its own words where it has them."""
    known = set(TrainingConfig.model_fields)
    for section in config:
        if section not in known:
            like = nearest(section, known)
            hint = f'did you mean "{like}"?' if like else f"sections: {', '.join(sorted(known))}"
            yield Fault(f"{place}: {section}", f"Unrecognized section: {section}", hint, code="unknown-key")
    quantization = config.get("QuantizationConfig")
    if isinstance(quantization, Mapping):
        four, eight = quantization.get("load_in_4bit"), quantization.get("load_in_8bit")
        path = f"{place}: QuantizationConfig"
        if method == "lora" and (four or eight):
            yield Fault(path, "For method 'lora', load_in_4bit and load_in_8bit must be false", "or use method: qlora")
        if method == "qlora" and not (four or eight):
            yield Fault(path, "For method 'qlora', load_in_4bit must be true", "or use method: lora")
    arguments = config.get("TrainingArguments")
    if isinstance(arguments, Mapping):
        yield from _best_rules(arguments, config.get("DatasetConfig"), place)
    output = arguments.get("output_dir") if isinstance(arguments, Mapping) else None
    if isinstance(output, str) and output.rstrip("/") != "/mnt/results":
        yield Fault(
            f"{place}: TrainingArguments.output_dir",
            f"{output!r}: results are written to /mnt/results",
            "leave it out, or write /mnt/results; the adapter is published from there",
        )


def _best_rules(arguments: Mapping[str, Any], data: Any, place: str) -> Iterator[Fault]:
    """transformers' rules on the best adapter: there are evaluations to choose among, and it is kept to stop early."""
    best, path = arguments.get("load_best_model_at_end"), f"{place}: TrainingArguments"
    if best and arguments.get("eval_strategy") == "no":
        hint = "eval_strategy: steps, or epoch"
        yield Fault(f"{path}.load_best_model_at_end", "needs evaluations to choose among", hint)
    if best and isinstance(data, Mapping) and data.get("train_test_split") == 1:
        hint = "a DatasetConfig.train_test_split below 1"
        yield Fault(f"{path}.load_best_model_at_end", "needs held-out data, and nothing is held out", hint)
    if arguments.get("early_stopping_patience") is not None and not best:
        hint = "load_best_model_at_end: true"
        yield Fault(f"{path}.early_stopping_patience", "needs the best adapter to be kept", hint)
