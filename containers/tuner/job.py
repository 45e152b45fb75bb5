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
    "Estimate",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "QuantizationConfig",
    "TrainingArguments",
    "TrainingConfig",
    "TunerJob",
    "WorldConfig",
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
class WorldConfig:
    """How many processes train: `processes` on each of `nodes` machines, which meet at `rendezvous`, `host:port`.

    The host is one of the machines. With one machine, no rendezvous is needed.
    """

    nodes: int
    processes: int
    rendezvous: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the plan counts with, in bytes: `needed` at the peak with `gradient_checkpointing` of every block, some of
    it in reserve; and `kept_block` more for each block that keeps its activations all the same.
    """

    needed: int
    kept_block: int


@dataclass(frozen=True, slots=True)
class TunerJob:
    """The job file; `root` is `/` in a pod.

    Args:
        version: of this file's form.
        workspace: whose adapter it is.
        identity: of the run: what is trained from what and how.
        root: what the paths below start from.
        method: in how many bits the base model is.
        model: the base model.
        dataset: the image of the dataset.
        output: the adapter's image.
        checkpoints: the image under which checkpoints are kept in a registry, if they are.
        checkpoint_seconds: how much time must lie between the beginnings of two pushes; 0: each checkpoint is pushed.
        world: the processes, where there is more than one.
        shard: whether the base model is divided among the processes, and not held by each of them whole.
        memory: what is needed of a GPU's memory; the rest is used to compute less twice.

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
    checkpoints: str | None = None
    checkpoint_seconds: float = 0.0
    world: WorldConfig | None = None
    shard: bool = False
    memory: Estimate | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.identity):
            raise InputError("must be 64 hex digits", place="identity", code="invalid-job")
        if not self.root.is_absolute():
            raise InputError(f"{str(self.root)!r} is not an absolute path", place="root", code="invalid-job")
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise InputError("must not be negative", place="checkpoint_seconds", code="invalid-job")
        if self.world is not None:
            _check_world(self.world)
        if self.memory is not None and min(self.memory.needed, self.memory.kept_block) < 1:
            raise InputError("must be at least 1", place="memory", code="invalid-job")
        if self.shard and self.method == "qlora":
            hint = "method lora can be; or a GPU that holds the model in 4 bits"
            message = "a model in 4 bits cannot be divided among processes"
            raise InputError(message, place="shard", hint=hint, code="shard-unsupported")

    @property
    def nodes(self) -> int:
        """How many machines train."""
        return self.world.nodes if self.world else 1

    @property
    def processes(self) -> int:
        """How many processes train on each machine."""
        return self.world.processes if self.world else 1

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


def _check_world(world: WorldConfig) -> None:
    for key in ("nodes", "processes"):
        if getattr(world, key) < 1:
            raise InputError("must be at least 1", place=f"world.{key}", code="invalid-job")
    if world.rendezvous is None:
        if world.nodes > 1:
            raise InputError("is required with several nodes", place="world.rendezvous", code="invalid-job")
    elif not re.fullmatch(r"[^\s:]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", world.rendezvous):
        message = f"{world.rendezvous!r} is not host:port"
        raise InputError(message, place="world.rendezvous", code="invalid-job")


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

    `per_device_train_batch_size` times `gradient_accumulation_steps` are the rows of one optimizer step, however many
    processes share them: with more GPUs the same training takes less time. The first of the two is also how many rows
    go through a GPU at once.

    With `save_strategy: no` a checkpoint is still kept each `save_steps`: it is what a killed run goes on from, and is
    removed when the adapter is published.

    With `load_best_model_at_end` the adapter is published as it was at the evaluation with the least held-out loss, and
    with `early_stopping_patience` the training stops when that many evaluations in a row were not better than the best
    before them by more than `early_stopping_threshold`; the last two are those of transformers' EarlyStoppingCallback.
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
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["loss", "eval_loss"] | None = None
    greater_is_better: Literal[False] | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0

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
    "TrainingArguments.max_grad_norm", "TrainingArguments.seed", "TrainingArguments.early_stopping_threshold",
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
    _check_best(config.TrainingArguments, f"{place}: TrainingArguments")
    if not config.LoraConfig.target_modules:
        raise ConfigError("names no module", place=f"{place}: LoraConfig.target_modules")


def _check_best(arguments: TrainingArguments, place: str) -> None:
    if arguments.load_best_model_at_end and arguments.eval_strategy == "no":
        hint = "eval_strategy: steps, or epoch"
        raise ConfigError("needs evaluations to choose among", place=f"{place}.load_best_model_at_end", hint=hint)
    if arguments.early_stopping_patience is None:
        return
    if arguments.early_stopping_patience < 1:
        message = f"must be at least 1, not {arguments.early_stopping_patience}"
        raise ConfigError(message, place=f"{place}.early_stopping_patience")
    if not arguments.load_best_model_at_end:
        hint = "load_best_model_at_end: true"
        raise ConfigError("needs the best adapter to be kept", place=f"{place}.early_stopping_patience", hint=hint)
