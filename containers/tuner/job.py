"""What the tuner is told: its job file, and the resolved `training_config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from kaito_flows.containers.program import strict
from kaito_flows.errors import ConfigError, InputError

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class Model:
    """The base model: its preset's name, its id on the Hub, and the revision."""

    preset: str
    id: str
    revision: str


@dataclass(frozen=True, slots=True)
class TunerJob:
    """The job file; `root` is `/` in a pod."""

    version: Literal[1]
    workspace: str
    identity: str
    root: Path
    method: Literal["qlora", "lora"]
    model: Model
    dataset: str
    output: str

    def __post_init__(self) -> None:
        if len(self.identity) != 64:
            raise InputError("must be 64 hex digits", place="identity", code="invalid-job")

    @property
    def config_file(self) -> Path:
        """The resolved training config."""
        return self.root / "mnt/config/training_config.yaml"

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
    """How the base model is loaded."""

    torch_dtype: DType
    local_files_only: bool
    device_map: Literal["auto"]
    attn_implementation: Literal["sdpa", "eager"]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """bitsandbytes' settings."""

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: DType
    bnb_4bit_use_double_quant: bool


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """PEFT's settings."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str]
    bias: Literal["none"]
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True, slots=True)
class TrainingArguments:
    """The settings of the loop."""

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


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The sections that the tuner reads; DatasetConfig and DataCollator have done their work before."""

    ModelConfig: ModelConfig
    QuantizationConfig: QuantizationConfig
    LoraConfig: LoraConfig
    TrainingArguments: TrainingArguments
    DatasetConfig: dict[str, Any]
    DataCollator: dict[str, Any]


def read_config(path: Path, method: str) -> TrainingConfig:
    """Read the resolved config.

    Raises:
        ConfigError: not there, not YAML, an unknown or missing key, a wrong type, or bits that the method does not take.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
        root = loaded["training_config"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as exc:
        raise ConfigError(f"cannot be read: {exc}", place=path.name) from exc
    config = strict(TrainingConfig, root, place=path.name, error=ConfigError)
    bits = config.QuantizationConfig
    if bits.load_in_8bit or bits.load_in_4bit != (method == "qlora"):
        raise ConfigError(
            f"method {method!r} with load_in_4bit={bits.load_in_4bit}, load_in_8bit={bits.load_in_8bit}",
            place=f"{path.name}: QuantizationConfig",
            hint="qlora takes load_in_4bit: true, lora takes neither",
        )
    return config
