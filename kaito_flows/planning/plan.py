"""The plan of a run: everything that is known of it before it starts, or the reason why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from kaito_flows import __version__
from kaito_flows.errors import PlanError
from kaito_flows.planning.cost import (
    cost_usd,
    evaluation_flops,
    machine_flops_per_second,
    sku_flops_per_second,
    training_flops,
    training_steps,
)
from kaito_flows.planning.identity import run_identity
from kaito_flows.planning.machine import Machine, this_machine
from kaito_flows.planning.memory import MemoryEstimate, tuning_memory
from kaito_flows.planning.skus import Candidate, candidates, check_instance_type, find_sku
from kaito_flows.planning.targets import resolve_targets
from kaito_flows.presets.loader import Preset, load_preset, load_skus
from kaito_flows.workspace import WorkspaceFile
from kaito_flows.workspace.training_config import ROOT_KEY

__all__ = ["DatasetFacts", "Plan", "make_plan", "plan_workspace", "requires_bf16"]

Platform = Literal["local", "kubernetes"]

# Of this machine's memory, what other programs may need.
MACHINE_SHARE = 0.9
# Beside the weights: the dataset, checkpoints, the adapter and its image.
DISK_REST = 1_000_000_000
BF16_CAPABILITY = 8.0


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What a plan needs to know of a prepared dataset: its image's digest, its packed rows and their tokens."""

    digest: str
    train_rows: int
    train_tokens: int
    validation_rows: int
    validation_tokens: int
    sequence_length: int

    @classmethod
    def of(cls, digest: str, facts: Mapping[str, Any]) -> DatasetFacts:
        """Take from a dataset image's `dataset.json` what a plan needs."""
        train = facts["splits"]["train"]
        validation = facts["splits"].get("validation") or {"rows": 0, "tokens": 0}
        return cls(
            digest=digest,
            train_rows=train["rows"],
            train_tokens=train["tokens"],
            validation_rows=validation["rows"],
            validation_tokens=validation["tokens"],
            sequence_length=facts["sequence_length"],
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can be done: what will be trained, where, and what it takes.

    `config` is the resolved training config with the model's own module names. `instance_type` is None on this machine.
    `steps`, `seconds`, `cost_usd` and `identity` need the prepared dataset: before, they are None and "".
    `flops_per_second` is what the device reaches in training. Prices are in USD, for the whole node.
    """

    workspace: str
    platform: Platform
    preset: Preset
    method: str
    config: dict[str, Any]
    memory: MemoryEstimate
    device: str
    device_memory: int | None
    instance_type: str | None
    candidates: tuple[Candidate, ...]
    price_usd_hour: float | None
    price_source: str
    flops_per_second: float
    notes: tuple[str, ...]
    dataset: DatasetFacts | None = None
    steps: int | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    identity: str = ""

    @property
    def model(self) -> dict[str, str]:
        """The model as job files name it."""
        return {"preset": self.preset.name, "id": self.preset.model_id, "revision": self.preset.revision}

    @property
    def config_yaml(self) -> str:
        """The resolved config as `training_config.yaml` holds it."""
        return yaml.safe_dump({ROOT_KEY: self.config}, sort_keys=False)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run may write: the weights, what they are made from, and `run_disk_bytes`."""
        return 3 * self.preset.parameters.total + self.run_disk_bytes

    @property
    def run_disk_bytes(self) -> int:
        """Bytes that the run may write where the weights are there already."""
        return DISK_REST

    def with_dataset(self, dataset: DatasetFacts) -> Plan:
        """Return the plan with what only the prepared data can tell: steps, time, cost, and the run's identity.

        Raises:
            PlanError: (code `empty-dataset`) there is nothing to train on.
        """
        if dataset.train_rows < 1:
            raise PlanError("the dataset has no row to train on", place="tuning.input", code="empty-dataset")
        steps = training_steps(dataset.train_rows, self.config)
        seconds = self._seconds(dataset, steps)
        priced = cost_usd(seconds, self.price_usd_hour) if self.price_usd_hour is not None else None
        source = self.preset.source.model_dump(mode="json")
        identity = run_identity(
            self.preset.model_id, self.preset.revision, source, self.method, self.config, dataset.digest, __version__
        )
        return replace(self, dataset=dataset, steps=steps, seconds=seconds, cost_usd=priced, identity=identity)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready facts."""
        return {
            "workspace": self.workspace,
            "platform": self.platform,
            "model": self.model,
            "method": self.method,
            "device": self.device,
            "device_memory": self.device_memory,
            "instance_type": self.instance_type,
            "memory": self.memory.as_dict(),
            "adapter_parameters": self.memory.adapter_parameters,
            "candidates": [
                {"name": c.sku.name, "free": c.free, "price_usd_hour": c.price_usd_hour} for c in self.candidates
            ],
            "price_usd_hour": self.price_usd_hour,
            "price_source": self.price_source,
            "disk_bytes": self.disk_bytes,
            "dataset": self.dataset.digest if self.dataset else None,
            "steps": self.steps,
            "seconds": round(self.seconds, 1) if self.seconds is not None else None,
            "cost_usd": round(self.cost_usd, 4) if self.cost_usd is not None else None,
            "identity": self.identity,
            "config": copy.deepcopy(self.config),
            "notes": list(self.notes),
        }

    def table_rows(self) -> list[dict[str, str]]:
        """The plan as rows for people: `item` and `value`."""
        memory, lora = self.memory, self.config["LoraConfig"]
        parts = ("weights", "adapter", "activations", "logits", "overhead")
        model, parameters = self.preset.model_id, self.preset.parameters.total
        rows = [
            ("model", f"{model} ({parameters / 1e6:,.0f} million parameters)"),
            ("method", f"{self.method}, r {lora['r']}, {memory.adapter_parameters:,} parameters"),
            ("adapted", ", ".join(lora["target_modules"])),
            ("memory", f"about {_gib(memory.total)}"),
            *(("", f"{_gib(getattr(memory, part))} {part}") for part in parts),
            ("device", self.device),
            ("price", self._price()),
        ]
        fitting = self.candidates[:3]
        rows += [("" if i else "sizes that fit", str(c)) for i, c in enumerate(fitting)]
        rows += [] if fitting else [("sizes that fit", "none on one GPU")]
        if self.dataset is not None and self.steps is not None and self.seconds is not None:
            facts = self.dataset
            rows += [
                ("dataset", f"{facts.train_rows:,} rows of {facts.sequence_length:,}, {facts.train_tokens:,} tokens"),
                ("held out", f"{facts.validation_rows:,} rows, {facts.validation_tokens:,} tokens"),
                ("steps", f"{self.steps:,}"),
                ("time", f"about {_duration(self.seconds)}"),
                ("cost", f"about {self.cost_usd:.2f} USD" if self.cost_usd else self._price()),
                ("identity", self.identity),
            ]
        else:
            rows.append(("steps, time, cost", "known once the data is prepared"))
        return [{"item": item, "value": value} for item, value in rows]

    def _price(self) -> str:
        if self.platform == "local":
            return "nothing: this machine"
        if self.price_usd_hour is None:
            return "not known"
        return f"{self.price_usd_hour:.2f} USD/h {self.price_source}"

    def _seconds(self, dataset: DatasetFacts, steps: int) -> float:
        """Training, and the held-out loss before and after it; loading the model is not counted."""
        arguments, length = self.config["TrainingArguments"], dataset.sequence_length
        epochs = arguments["num_train_epochs"]
        if arguments["max_steps"] > 0:
            epochs = steps / max(training_steps(dataset.train_rows, _one_epoch(self.config)), 1)
        a_token = training_flops(
            self.preset, self.memory.adapter_parameters, length, recompute=arguments["gradient_checkpointing"]
        )
        training = epochs * dataset.train_rows * length * a_token
        evaluation = 2 * dataset.validation_rows * length * evaluation_flops(self.preset, length)
        return float(training + evaluation) / self.flops_per_second


def make_plan(
    preset: Preset,
    method: str,
    resolved_config: Mapping[str, Any],
    *,
    workspace: str,
    instance_type: str | None = None,
    dataset: DatasetFacts | None = None,
    platform: Platform = "local",
    machine: Machine | None = None,
) -> Plan:
    """Plan the tuning of `preset` with a resolved training config.

    On `local` the node is this machine and costs nothing; on `kubernetes` it is one of `instance_type`, or an own node
    of which nothing is known when that is empty. `machine` stands for this machine.

    Raises:
        PlanError: (codes of `check_instance_type`) the size cannot do it; (code `machine-too-small`) this machine
            cannot; (code `sequence-too-long`) rows longer than the model can read.
        ConfigError: a target module that the model does not have.
    """
    config = copy.deepcopy(dict(resolved_config))
    targets, notes = resolve_targets(preset, config["LoraConfig"]["target_modules"])
    config["LoraConfig"]["target_modules"] = list(targets)
    _check_length(preset, config)
    if config["DatasetConfig"]["train_test_split"] == 1:
        notes += ("train_test_split: 1 holds nothing out: that the adapter is better than its base will not be shown",)
    if not preset.chat_template:
        notes += (f"{preset.name} is a base model without a chat template",)
    estimate, bf16, skus = tuning_memory(preset, config, method), requires_bf16(config), load_skus()
    fitting = candidates(estimate, skus, bf16)
    machine = machine or this_machine()
    if platform == "local":
        if instance_type:
            # The file would be refused on a cluster, so it is refused here.
            check_instance_type(instance_type, estimate, skus, bf16)
            notes += (f"{instance_type} is not used: this platform runs on this machine",)
        _check_machine(machine, estimate, fitting, bf16)
        plan = Plan(
            workspace=workspace,
            platform=platform,
            preset=preset,
            method=method,
            config=config,
            memory=estimate,
            device=str(machine),
            device_memory=machine.device_memory,
            instance_type=None,
            candidates=fitting,
            price_usd_hour=0.0,
            price_source="",
            flops_per_second=machine_flops_per_second(machine, skus),
            notes=notes,
        )
    else:
        sku = check_instance_type(instance_type, estimate, skus, bf16) if instance_type else None
        if instance_type and find_sku(instance_type, skus) is None:
            notes += (f"nothing is known of {instance_type}: whether it fits, how fast it is, what it costs",)
        described = f"{sku.gpus} x {sku.gpu_model}, {sku.gpu_memory_gib:g} GiB each" if sku else "size not known"
        plan = Plan(
            workspace=workspace,
            platform=platform,
            preset=preset,
            method=method,
            config=config,
            memory=estimate,
            device=f"{instance_type or 'own node'} ({described})",
            device_memory=int(sku.gpu_memory_gib * 2**30) if sku else None,
            instance_type=instance_type or None,
            candidates=fitting,
            price_usd_hour=sku.price_usd_hour if sku else None,
            price_source=f"({sku.price_region}, {sku.price_date})" if sku and sku.price_usd_hour is not None else "",
            flops_per_second=sku_flops_per_second(sku),
            notes=notes,
        )
    return plan.with_dataset(dataset) if dataset is not None else plan


def plan_workspace(file: WorkspaceFile, platform: Platform) -> Plan:
    """Plan what a Workspace file asks for.

    Raises:
        PlanError: it is not for tuning; and as `make_plan`.
        ConfigError: as `make_plan`.
    """
    tuning = file.workspace.tuning
    if tuning is None or file.training_config is None:
        raise PlanError("this Workspace tunes nothing", place="tuning", hint="plans are for tuning")
    return make_plan(
        load_preset(tuning.preset.name),
        tuning.method,
        file.training_config.model_dump(mode="json"),
        workspace=file.workspace.name,
        instance_type=file.workspace.resource.instance_type or None,
        platform=platform,
    )


def requires_bf16(config: Mapping[str, Any]) -> bool:
    """Whether the config computes in bfloat16, which GPUs before compute capability 8.0 do not have."""
    quantization = config["QuantizationConfig"]
    in_4bit = quantization["load_in_4bit"] and quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    return bool(in_4bit or config["ModelConfig"]["torch_dtype"] == "bfloat16")


def _check_length(preset: Preset, config: Mapping[str, Any]) -> None:
    length, longest = config["TrainingArguments"]["max_length"], preset.architecture.context_length
    if length > longest:
        raise PlanError(
            f"rows of {length} tokens; {preset.name} reads {longest}",
            place="training_config.yaml: TrainingArguments.max_length",
            hint=f"write {longest} or less",
            code="sequence-too-long",
        )


def _check_machine(
    machine: Machine, estimate: MemoryEstimate, fitting: tuple[Candidate, ...], requires_bf16: bool
) -> None:
    if requires_bf16 and machine.gpu_model and machine.compute_capability < BF16_CAPABILITY:
        raise PlanError(
            f"the {machine.gpu_model} of this machine has no bfloat16",
            place="training_config.yaml: ModelConfig.torch_dtype",
            hint="write float16 there and in bnb_4bit_compute_dtype, or hide the GPU: CUDA_VISIBLE_DEVICES=-1",
            code="no-bf16",
        )
    usable = int(machine.device_memory * MACHINE_SHARE)
    if usable < estimate.total:
        sizes = ", ".join(map(str, fitting[:3]))
        raise PlanError(
            f"about {_gib(estimate.total)} of memory needed; {machine} has {_gib(usable)} to give",
            place="tuning.preset.name",
            hint=f"a smaller model or max_length, or a cluster with one of: {sizes}" if sizes else "a smaller model",
            code="machine-too-small",
        )


def _one_epoch(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {**config["TrainingArguments"], "max_steps": -1, "num_train_epochs": 1.0}
    return {**config, "TrainingArguments": arguments}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
