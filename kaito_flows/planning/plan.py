"""The plan of a run: everything that is known of it before it starts, or the reason why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from kaito_flows import __version__
from kaito_flows.errors import PlanError
from kaito_flows.planning.cost import (
    cost_usd,
    evaluation_flops,
    parallel_share,
    rows_a_step,
    training_flops,
    training_steps,
)
from kaito_flows.planning.identity import run_identity
from kaito_flows.planning.machine import Machine, this_machine
from kaito_flows.planning.memory import MemoryEstimate, memory_key, sharded_memory, tuning_memory
from kaito_flows.planning.place import Advice, Place, Platform, choose_place
from kaito_flows.planning.skus import Candidate
from kaito_flows.planning.targets import resolve_targets
from kaito_flows.planning.words import duration, gib
from kaito_flows.presets.loader import Preset, load_preset
from kaito_flows.workspace import WorkspaceFile
from kaito_flows.workspace.training_config import ROOT_KEY

__all__ = ["DatasetFacts", "Measured", "Plan", "make_plan", "plan_rented", "plan_workspace", "requires_bf16"]

# Beside the weights: the dataset, checkpoints, the adapter and its image.
DISK_REST = 1_000_000_000
_ADVICE = Advice(
    model_place="tuning.preset.name",
    dtype_place="training_config.yaml: ModelConfig.torch_dtype",
    dtype_hint="write float16 there and in bnb_4bit_compute_dtype",
    smaller="a smaller model or max_length",
    remedy="use qlora, a shorter max_length, or gradient_checkpointing: true",
)


Measured = Callable[[str], float | None]
"""What trainings with that `memory_key` took, as a share of what the formulas say; None where that is not known."""


def _nothing(_key: str) -> None:
    return None


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

    `config` is the resolved training config with the model's own module names. `place` is where: `nodes` nodes, each
    with all of its `gpus` GPUs. `memory` is what each GPU takes; with `shard`, the model is divided among them. GPUs
    share the rows of a step, so that their number changes the time and not the adapter. `steps`, `seconds`, `cost_usd`
    and `identity` need the prepared dataset: before, they are None and "". Prices are in USD, the cost for all nodes.
    """

    workspace: str
    platform: Platform
    preset: Preset
    method: str
    config: dict[str, Any]
    memory: MemoryEstimate
    place: Place
    notes: tuple[str, ...]
    dataset: DatasetFacts | None = None
    steps: int | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    identity: str = ""

    @property
    def gpus(self) -> int:
        """How many GPUs of each node train, or processes without one."""
        return self.place.gpus

    @property
    def nodes(self) -> int:
        """How many nodes train."""
        return self.place.nodes

    @property
    def shard(self) -> bool:
        """Whether the model fits only divided among the GPUs."""
        return self.place.divided

    @property
    def memory_key(self) -> str:
        """The name of all trainings that take as much memory."""
        device = "gpu" if self.place.has_gpu else "cpu"
        return memory_key(self.preset, self.config, self.method, device)

    @property
    def blocks_recomputed(self) -> int:
        """How many of the model's blocks compute their activations again: those whose own find no room on a GPU.

        The tuner asks the GPU itself; this is for the time.
        """
        blocks = self.preset.architecture.layers
        if not self.config["TrainingArguments"]["gradient_checkpointing"]:
            return 0
        if not (self.memory.kept_block and self.place.has_gpu and self.place.usable):
            return blocks
        return blocks - min(blocks, max(0, self.place.usable - self.memory.needed) // self.memory.kept_block)

    @property
    def device(self) -> str:
        """The device in words."""
        return self.place.device

    @property
    def device_memory(self) -> int | None:
        """Bytes of one GPU, or of this machine; None where the node is not known."""
        return self.place.device_memory

    @property
    def instance_type(self) -> str | None:
        """The size; None on this machine, and on own nodes."""
        return self.place.instance_type

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The sizes that fit, cheapest first."""
        return self.place.candidates

    @property
    def price_usd_hour(self) -> float | None:
        """USD an hour for one node; None where it is not known."""
        return self.place.price_usd_hour

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
        price = self.place.price_usd_hour
        priced = cost_usd(seconds, price) * self.nodes if price is not None else None
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
            "gpus": self.gpus,
            "nodes": self.nodes,
            "shard": self.shard,
            "memory": self.memory.as_dict(),
            "memory_measured": self.memory.measured,
            "blocks_recomputed": self.blocks_recomputed,
            "adapter_parameters": self.memory.adapter_parameters,
            "candidates": [
                {"name": c.sku.name, "free": c.free, "price_usd_hour": c.price_usd_hour} for c in self.candidates
            ],
            "price_usd_hour": self.price_usd_hour,
            "price_source": self.place.price_source,
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
            ("memory", f"about {gib(memory.total)}{' on each GPU' if self.processes > 1 else ''}{self._measured()}"),
            *(("", f"{gib(getattr(memory, part))} {part}") for part in parts),
            *(
                [("recomputed", self._recomputed())]
                if self.config["TrainingArguments"]["gradient_checkpointing"]
                else []
            ),
            ("device", self.device),
            *([("GPUs", self._gpus())] if self.processes > 1 else []),
            ("price", self.place.price),
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
                ("time", f"about {duration(self.seconds)}"),
                ("cost", f"about {self.cost_usd:.2f} USD" if self.cost_usd else self.place.price),
                ("identity", self.identity),
            ]
        else:
            rows.append(("steps, time, cost", "known once the data is prepared"))
        return [{"item": item, "value": value} for item, value in rows]

    @property
    def processes(self) -> int:
        """How many processes train, one for each GPU."""
        return self.gpus * self.nodes

    @property
    def speed_share(self) -> float:
        """What each GPU keeps of its speed beside the others."""
        return parallel_share(self.gpus, self.nodes, divided=self.shard)

    def _measured(self) -> str:
        share = self.memory.measured
        return "" if share == 1.0 else f", as measured ({share:.0%} of the estimate)"

    def _recomputed(self) -> str:
        blocks, again = self.preset.architecture.layers, self.blocks_recomputed
        if again == 0:
            return f"nothing: the activations of all {blocks} blocks find room"
        return f"the activations of {'all' if again == blocks else f'{again} of'} {blocks} blocks"

    def _gpus(self) -> str:
        where = f"{self.nodes} nodes with {self.gpus} each" if self.nodes > 1 else "one node"
        divided = "the model divided among them, " if self.shard else ""
        return f"{self.processes} ({where}), {divided}each at {self.speed_share:.0%} of its speed"

    def _seconds(self, dataset: DatasetFacts, steps: int) -> float:
        """Training, and the held-out loss before and after it; loading the model is not counted.

        A step takes as long as the GPU with the most of its rows.
        """
        arguments, length = self.config["TrainingArguments"], dataset.sequence_length
        epochs = arguments["num_train_epochs"]
        if arguments["max_steps"] > 0:
            epochs = steps / max(training_steps(dataset.train_rows, _one_epoch(self.config)), 1)
        recompute = self.blocks_recomputed / self.preset.architecture.layers
        a_token = training_flops(self.preset, self.memory.adapter_parameters, length, recompute=recompute)
        whole_steps, rest = divmod(dataset.train_rows, rows_a_step(self.config))
        rows = whole_steps * self._largest_share(rows_a_step(self.config)) + self._largest_share(rest)
        training = epochs * rows * length * a_token
        evaluation = 2 * self._largest_share(dataset.validation_rows) * length * evaluation_flops(self.preset, length)
        return float(training + evaluation) / (self.place.flops_per_second * self.speed_share)

    def _largest_share(self, rows: int) -> int:
        return -(-rows // self.processes)


def make_plan(
    preset: Preset,
    method: str,
    resolved_config: Mapping[str, Any],
    *,
    workspace: str,
    instance_type: str | None = None,
    nodes: int = 1,
    gpus: int | None = None,
    dataset: DatasetFacts | None = None,
    platform: Platform = "local",
    machine: Machine | None = None,
    measured: Measured = _nothing,
) -> Plan:
    """Plan the tuning of `preset` with a resolved training config.

    On `local` the node is this machine and costs nothing; on `kubernetes` there are `nodes` of `instance_type`, or own
    ones when that is empty, of which nothing is known but how many `gpus` each has, if that is told (else 1 is used).
    `machine` stands for this machine. `measured` knows what trainings before took.

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
    formulas = tuning_memory(preset, config, method)

    def sharded(processes: int) -> MemoryEstimate:
        return sharded_memory(preset, config, formulas, processes)

    def estimated(device: str) -> MemoryEstimate:
        share = measured(memory_key(preset, config, method, device))
        return formulas if share is None else formulas.scaled(share)

    if platform == "local":
        machine = machine or this_machine()
    here = estimated("cpu") if machine and not machine.gpu_model else None
    estimate = estimated("gpu")
    place = choose_place(
        estimate,
        here=here,
        platform=platform,
        requires_bf16=requires_bf16(config),
        advice=_ADVICE,
        instance_type=instance_type,
        nodes=nodes,
        gpus=gpus,
        divided=sharded if method == "lora" else None,  # PyTorch cannot divide bitsandbytes' 4-bit weights
        machine=machine,
    )
    processes, rows = place.gpus * place.nodes, rows_a_step(config)
    if processes > rows:
        notes += (
            f"a step has {rows} rows, so that only {rows} of {processes} GPUs have work: "
            f"with gradient_accumulation_steps: {processes} all have (and the training is another one)",
        )
    plan = Plan(
        workspace=workspace,
        platform=platform,
        preset=preset,
        method=method,
        config=config,
        memory=sharded(processes) if place.divided else estimate if place.has_gpu else here or estimate,
        place=place,
        notes=notes + place.notes,
    )
    return plan.with_dataset(dataset) if dataset is not None else plan


def plan_workspace(
    file: WorkspaceFile,
    platform: Platform,
    *,
    gpus: int | None = None,
    instance_type: str | None = None,
    measured: Measured = _nothing,
) -> Plan:
    """Plan the tuning that a Workspace file asks for, on nodes of `instance_type` if it names none itself.

    `gpus` and `measured` as in `make_plan`.

    Raises:
        PlanError: it is not for tuning; and as `make_plan`.
        ConfigError: as `make_plan`.
    """
    tuning = file.workspace.tuning
    if tuning is None or file.training_config is None:
        raise PlanError("this Workspace tunes nothing", place="tuning", hint="`plan_serving` plans what it serves")
    return make_plan(
        load_preset(tuning.preset.name).from_image(tuning.preset.preset_options.image),
        tuning.method,
        file.training_config.resolved(),
        workspace=file.workspace.name,
        instance_type=file.workspace.resource.instance_type or instance_type,
        nodes=file.workspace.resource.count if platform == "kubernetes" else 1,
        gpus=gpus,
        platform=platform,
        measured=measured,
    )


def plan_rented(file: WorkspaceFile, *, measured: Measured = _nothing) -> Plan:
    """Plan the tuning that a Workspace file asks for where nodes are rented: no size means the cheapest that fits.

    Raises:
        PlanError: as `plan_workspace`.
        ConfigError: as `plan_workspace`.
    """
    gpus = file.workspace.gpus
    made = plan_workspace(file, "kubernetes", gpus=gpus, measured=measured)
    if made.instance_type is None and made.candidates and gpus != 0:
        size = made.candidates[0].sku.name
        made = plan_workspace(file, "kubernetes", gpus=gpus, instance_type=size, measured=measured)
    return made


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


def _one_epoch(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {**config["TrainingArguments"], "max_steps": -1, "num_train_epochs": 1.0}
    return {**config, "TrainingArguments": arguments}
