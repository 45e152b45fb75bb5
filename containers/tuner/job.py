"""What the tuner is told: its job file, and the resolved `training_config.yaml`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from kaito_flows.containers.program import strict
from kaito_flows.errors import ConfigError, InputError

__all__ = [
    "CONFIG_NAME",
    "DataCollator",
    "DatasetConfig",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "QuantizationConfig",
    "TrainingArguments",
    "TrainingConfig",
    "TunerJob",
    "read_config",
]

CONFIG_NAME = "training_config.yaml"
ROOT_KEY = "training_config"

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class Model:
    """The base model: its preset's name, its id on the Hub, and the revision."""

    preset: str
    id: str
    revision: str


@dataclass(frozen=True, slots=True)
class TunerJob:
    """The job file; `root` is `/` in a pod.

    Raises:
        InputError: a value that cannot be used, with its key.
    """

    version: Literal[1]
    workspace: str
    identity: str
    root: Path
    method: Literal["lora", "qlora"]
    model: Model
    dataset: str
    output: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.identity):
            raise InputError("must be 64 hex digits", place="identity", code="invalid-job")
        if not self.root.is_absolute():
            raise InputError(f"{str(self.root)!r} is not an absolute path", place="root", code="invalid-job")

    @property
    def config_file(self) -> Path:
        """The resolved training config."""
        return self.root / "mnt/config" / CONFIG_NAME

    @property
    def data(self) -> Path:
        """Where the dataset image is unpacked."""
        return self.root / "mnt/data"

    @property
    def results(self) -> Path:
        """Where checkpoints and the adapter are written."""
        return self.root / "mnt/results"

    @property
    def weights(self) -> Path:
        """The base model's folder."""
        return self.root / "workspace/weights"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How the base model is loaded: on the one device there is, from its folder."""

    torch_dtype: DType
    local_files_only: Literal[True]
    device_map: Literal["auto"]
    attn_implementation: Literal["sdpa", "eager"]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """bitsandbytes' settings."""

    load_in_4bit: bool
    load_in_8bit: Literal[False]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: DType
    bnb_4bit_use_double_quant: bool


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """PEFT's settings; `target_modules` are the ends of module names."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    bias: Literal["none"]
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True, slots=True)
class TrainingArguments:
    """The settings of the loop, as transformers names them.

    With `save_strategy: no` a checkpoint is still kept each `save_steps`: it is what a killed run goes on from, and is
    removed when the adapter is published.
    """

    output_dir: str
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    optim: Literal["adamw_torch"]
    logging_steps: int
    save_strategy: Literal["steps", "epoch", "no"]
    save_steps: int
    save_total_limit: int
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: int
    gradient_checkpointing: bool
    seed: int
    max_length: int
    packing: bool
    ddp_find_unused_parameters: bool
    report_to: Literal["none"]

    @property
    def rows_a_step(self) -> int:
        """Rows in an optimizer step; an epoch's last may have fewer."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """How the dataset was made. Of the loop's concern is only whether rows are trained on in their own order."""

    shuffle_dataset: bool
    shuffle_seed: int
    train_test_split: float
    messages_column: str | None
    context_column: str | None
    response_column: str | None


@dataclass(frozen=True, slots=True)
class DataCollator:
    """KAITO's collator section; `mlm` says nothing to causal models."""

    mlm: bool


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The resolved config: every section, every key."""

    ModelConfig: ModelConfig
    QuantizationConfig: QuantizationConfig
    LoraConfig: LoraConfig
    TrainingArguments: TrainingArguments
    DatasetConfig: DatasetConfig
    DataCollator: DataCollator


def read_config(path: Path, method: str) -> TrainingConfig:
    """Read the resolved config.

    Raises:
        ConfigError: not there, not YAML; a key that is unknown or missing, a value of the wrong type or out of its
            range; or bits that the method does not take.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", place=str(path)) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"not YAML: {exc}", place=path.name) from exc
    if not isinstance(loaded, dict) or set(loaded) != {ROOT_KEY}:
        raise ConfigError(f"the root must be a mapping with the one key {ROOT_KEY!r}", place=path.name)
    config = strict(TrainingConfig, loaded[ROOT_KEY], place=path.name, error=ConfigError)
    _check_ranges(config, path.name)
    if config.QuantizationConfig.load_in_4bit != (method == "qlora"):
        needed = "must be true" if method == "qlora" else "must be false"
        place = f"{path.name}: QuantizationConfig.load_in_4bit"
        raise ConfigError(f"{needed} for method {method!r}", place=place, hint="or use the other method")
    return config


_AT_LEAST_ONE = (
    "LoraConfig.r", "TrainingArguments.per_device_train_batch_size", "TrainingArguments.per_device_eval_batch_size",
    "TrainingArguments.gradient_accumulation_steps", "TrainingArguments.logging_steps", "TrainingArguments.save_steps",
    "TrainingArguments.save_total_limit", "TrainingArguments.eval_steps",
)  # fmt: skip
_ABOVE_ZERO = ("LoraConfig.lora_alpha", "TrainingArguments.num_train_epochs", "TrainingArguments.adam_epsilon")
_NOT_NEGATIVE = (
    "TrainingArguments.learning_rate", "TrainingArguments.warmup_steps", "TrainingArguments.weight_decay",
    "TrainingArguments.max_grad_norm", "TrainingArguments.seed",
)  # fmt: skip
_BELOW_ONE = (
    "LoraConfig.lora_dropout", "TrainingArguments.warmup_ratio", "TrainingArguments.adam_beta1",
    "TrainingArguments.adam_beta2",
)  # fmt: skip


def _check_ranges(config: TrainingConfig, place: str) -> None:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (_ABOVE_ZERO, lambda v: 0 < v < float("inf"), "must be above 0"),
        (_NOT_NEGATIVE, lambda v: 0 <= v < float("inf"), "must not be negative"),
        (_BELOW_ONE, lambda v: 0 <= v < 1, "must be from 0 up to but not including 1"),
    )
    for keys, holds, must in rules:
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if not holds(value):
                raise ConfigError(f"{must}, not {value}", place=f"{place}: {key}")
    if config.TrainingArguments.max_steps < 1 and config.TrainingArguments.max_steps != -1:
        raise ConfigError("must be at least 1, or -1: by epochs", place=f"{place}: TrainingArguments.max_steps")
    if not config.LoraConfig.target_modules:
        raise ConfigError("names no module", place=f"{place}: LoraConfig.target_modules")
