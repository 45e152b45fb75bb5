"""The plan of a service: what an inference Workspace will take on its node, or the reason why it cannot be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kaito_flows.errors import PlanError
from kaito_flows.planning.machine import Machine
from kaito_flows.planning.place import Advice, Place, Platform, choose_place
from kaito_flows.planning.serving_memory import ADAPTER_RANK, ServingMemory, cache_bytes, serving_memory
from kaito_flows.planning.skus import candidates
from kaito_flows.planning.words import gib
from kaito_flows.presets.loader import Preset, load_preset, load_skus
from kaito_flows.workspace import InferenceConfig, WorkspaceFile

__all__ = ["ServingPlan", "make_serving_plan", "plan_serving"]

# Who says nothing of the length must have room for a conversation at least.
SHORTEST = 2048
# And gets what fits in a share of what a program can have (with `usable_bytes`, 84 % of a GPU, as KAITO gives to vLLM),
# in whole blocks of so many tokens.
LENGTH_SHARE = 0.9
LENGTH_STEP = 256
# Beside the weights: the adapters' files.
DISK_REST = 1_000_000_000
_ADVICE = Advice(
    model_place="inference.preset.name",
    dtype_place="inference_config.yaml: vllm.dtype",
    dtype_hint="write float16 there",
    smaller="a smaller model or vllm.max-model-len",
    remedy="use a shorter vllm.max-model-len in inference_config.yaml, or a smaller model",
)


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """A service that can be had: what is served, where, and what it takes.

    `max_model_len` is the most tokens of a prompt with its answer: what was asked for, else what the device holds.
    `memory` is what each GPU takes; the model's layers are divided among those of the node. The base is served in
    `dtype`, not quantized. Prices are in USD, for the whole node, for as long as the service is up.
    """

    workspace: str
    platform: Platform
    preset: Preset
    dtype: str
    max_model_len: int
    adapters: tuple[str, ...]
    memory: ServingMemory
    place: Place
    notes: tuple[str, ...]

    @property
    def model(self) -> dict[str, str]:
        """The model as job files name it."""
        return {"preset": self.preset.name, "id": self.preset.model_id, "revision": self.preset.revision}

    @property
    def config_yaml(self) -> str:
        """The resolved config as `inference_config.yaml` holds it."""
        return yaml.safe_dump({"vllm": {"max-model-len": self.max_model_len, "dtype": self.dtype}}, sort_keys=False)

    @property
    def gpus(self) -> int:
        """The node's GPUs; all of them are the service's."""
        return self.place.gpus

    @property
    def instance_type(self) -> str | None:
        """The size; None on this machine, and on own nodes."""
        return self.place.instance_type

    @property
    def price_usd_hour(self) -> float | None:
        """USD an hour for the node; None where it is not known."""
        return self.place.price_usd_hour

    @property
    def disk_bytes(self) -> int:
        """Bytes that the service may write: the weights, what they are made from, and its adapters."""
        return 3 * self.preset.parameters.total + DISK_REST

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready facts."""
        place = self.place
        return {
            "workspace": self.workspace,
            "platform": self.platform,
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "adapters": list(self.adapters),
            "device": place.device,
            "device_memory": place.device_memory,
            "instance_type": place.instance_type,
            "gpus": place.gpus,
            "memory": self.memory.as_dict(),
            "candidates": [
                {"name": c.sku.name, "free": c.free, "price_usd_hour": c.price_usd_hour} for c in place.candidates
            ],
            "price_usd_hour": place.price_usd_hour,
            "price_source": place.price_source,
            "disk_bytes": self.disk_bytes,
            "notes": list(self.notes),
        }

    def table_rows(self) -> list[dict[str, str]]:
        """The plan as rows for people: `item` and `value`."""
        memory, place = self.memory, self.place
        parts = ("weights", "adapters", "cache", "activations", "overhead")
        a_token = cache_bytes(self.preset, 1, self.dtype)
        divided = f" on each of {place.gpus} GPUs, the layers divided among them" if place.gpus > 1 else ""
        rows = [
            ("model", f"{self.preset.model_id} ({self.preset.parameters.total / 1e6:,.0f} million parameters)"),
            ("adapters", ", ".join(self.adapters) or "none: the base model alone"),
            ("type", f"{self.dtype}, not quantized"),
            ("length", f"{self.max_model_len:,} tokens, prompt and answer together; {a_token:,} bytes of cache each"),
            ("memory", f"about {gib(memory.total)}{divided}"),
            *(("", f"{gib(getattr(memory, part))} {part}") for part in parts),
            ("device", place.device),
            ("price", f"{place.price}, for as long as it serves" if place.price_source else place.price),
        ]
        fitting = place.candidates[:3]
        rows += [("" if i else "sizes that fit", str(c)) for i, c in enumerate(fitting)]
        rows += [] if fitting else [("sizes that fit", "none")]
        return [{"item": item, "value": value} for item, value in rows]


def make_serving_plan(
    preset: Preset,
    *,
    workspace: str,
    adapters: Sequence[str] = (),
    config: InferenceConfig | None = None,
    instance_type: str | None = None,
    gpus: int | None = None,
    platform: Platform = "local",
    machine: Machine | None = None,
) -> ServingPlan:
    """Plan the service of `preset` with adapters, by their names.

    On `local` the node is this machine; on `kubernetes` it is one of `instance_type`, or an own node when that is
    empty, of which nothing is known but how many `gpus` it has, if that is told. `machine` stands for this machine.

    Raises:
        PlanError: (code `sequence-too-long`) the model does not read what the config asks for; and as `choose_place`.
    """
    config = config or InferenceConfig()
    asked, longest = config.max_model_len, preset.architecture.context_length
    if asked is not None and asked > longest:
        raise PlanError(
            f"{asked} tokens; {preset.name} reads {longest}",
            place="inference_config.yaml: vllm.max-model-len",
            hint=f"write {longest} or less",
            code="sequence-too-long",
        )
    dtype = config.torch_dtype
    bf16 = dtype == "bfloat16"

    def needed(length: int, gpus: int = 1) -> ServingMemory:
        return serving_memory(preset, max_model_len=length, adapters=len(adapters), dtype=dtype, gpus=gpus)

    least = asked or min(SHORTEST, longest)
    place = choose_place(
        needed(least),
        platform=platform,
        requires_bf16=bf16,
        advice=_ADVICE,
        instance_type=instance_type,
        gpus=gpus,
        divided=lambda gpus: needed(least, gpus),
        machine=machine,
    )
    length = asked or _longest_that_fits(lambda tokens: needed(tokens, place.gpus).total, place.usable, least, longest)
    fitting = candidates(needed(length), load_skus(), bf16, divided=lambda gpus: needed(length, gpus))
    notes = place.notes
    if length < longest and asked is None:
        notes += (f"prompts and answers of up to {length:,} tokens fit this device; the model reads {longest:,}",)
    if adapters:
        notes += (f"an adapter's rank is not known before its image is read: {ADAPTER_RANK} is counted",)
    if not preset.chat_template:
        notes += (f"{preset.name} is a base model without a chat template",)
    return ServingPlan(
        workspace=workspace,
        platform=platform,
        preset=preset,
        dtype=dtype,
        max_model_len=length,
        adapters=tuple(adapters),
        memory=needed(length, place.gpus),
        place=dataclasses.replace(place, candidates=fitting),
        notes=notes,
    )


def plan_serving(
    file: WorkspaceFile, platform: Platform, *, gpus: int | None = None, machine: Machine | None = None
) -> ServingPlan:
    """Plan the service that a Workspace file asks for; `gpus` and `machine` as in `make_serving_plan`.

    Raises:
        PlanError: it serves no preset; and as `make_serving_plan`.
    """
    inference = file.workspace.inference
    if inference is None or inference.preset is None:
        message = "a pod template says itself what it takes" if inference else "this Workspace serves nothing by itself"
        raise PlanError(message, place="inference", hint="plans are for presets", code="not-supported")
    return make_serving_plan(
        load_preset(inference.preset.name).from_image(inference.preset.preset_options.image),
        workspace=file.workspace.name,
        adapters=[adapter.source.name for adapter in inference.adapters],
        config=file.inference_config,
        instance_type=file.workspace.resource.instance_type or None,
        gpus=gpus,
        platform=platform,
        machine=machine,
    )


def _longest_that_fits(needed: Callable[[int], int], usable: int | None, least: int, longest: int) -> int:
    """The most tokens, up to what the model reads, with which `needed(tokens)` is within a share of `usable` bytes."""
    if usable is None or needed(longest) <= usable * LENGTH_SHARE:
        return longest
    low, high = least, longest  # `high` does not fit; `low` does, or is what must be had
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= usable * LENGTH_SHARE else (low, middle)
    return max(least, low - low % LENGTH_STEP)
