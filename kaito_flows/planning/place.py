"""Where a plan's work runs: this machine, or nodes of a size; what they give, what they cost, or why they cannot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from kaito_flows.errors import PlanError
from kaito_flows.planning.cost import machine_flops_per_second, sku_flops_per_second
from kaito_flows.planning.machine import Machine, this_machine
from kaito_flows.planning.skus import (
    Candidate,
    Divided,
    Estimate,
    candidates,
    check_instance_type,
    find_sku,
    is_divided,
    usable_bytes,
)
from kaito_flows.planning.words import gib
from kaito_flows.presets.loader import Sku, load_skus

__all__ = ["Advice", "Place", "Platform", "choose_place"]

Platform = Literal["local", "kubernetes"]

# Of this machine's memory, what other programs may need.
MACHINE_SHARE = 0.9
BF16_CAPABILITY = 8.0


@dataclass(frozen=True, slots=True)
class Advice:
    """What to tell whose plan cannot hold.

    Where the model is named; where the data type is set, and to what; what takes less memory on this machine, and what
    to do where no known size holds it.
    """

    model_place: str
    dtype_place: str
    dtype_hint: str
    smaller: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Place:
    """`nodes` nodes with `gpus` GPUs each (on this machine without one, 1), of which each has the memory and speed.

    `usable` are the bytes that a program can have of `device_memory`; None where the node is not known. `divided` says
    that the model fits only in parts, one on each GPU. `has_gpu` is False on a machine without one, whose memory others
    use too. `instance_type` is None on this machine and on own nodes.
    Prices are in USD for one node.
    """

    device: str
    device_memory: int | None
    usable: int | None
    instance_type: str | None
    candidates: tuple[Candidate, ...]
    price_usd_hour: float | None
    price_source: str
    flops_per_second: float
    gpus: int = 1
    nodes: int = 1
    divided: bool = False
    has_gpu: bool = True
    notes: tuple[str, ...] = ()

    @property
    def price(self) -> str:
        """The price for people: what all nodes cost in an hour."""
        if self.price_usd_hour is None:
            return "not known"
        if not self.price_source:
            return "nothing: this machine"
        each = f", {self.nodes} nodes of {self.price_usd_hour:.2f}" if self.nodes > 1 else ""
        return f"{self.price_usd_hour * self.nodes:.2f} USD/h{each} {self.price_source}"


def choose_place(
    estimate: Estimate,
    *,
    platform: Platform,
    requires_bf16: bool,
    advice: Advice,
    instance_type: str | None = None,
    nodes: int = 1,
    gpus: int | None = None,
    divided: Divided | None = None,
    machine: Machine | None = None,
    here: Estimate | None = None,
) -> Place:
    """Return where it can run: on `local` this machine, on `kubernetes` nodes of `instance_type`, or own ones.

    `divided` says what each of so many GPUs takes where the model can be divided among them. `gpus` is how many GPUs an
    own node has; unless it is told, 1 is counted. `machine` stands for this machine, and `here` is what it takes on one
    without a GPU, if that is another estimate.

    Raises:
        PlanError: (codes of `check_instance_type`) the size cannot do it; (codes `no-bf16`, `machine-too-small`) this
            machine cannot.
    """
    skus = load_skus()
    # On this machine too: the file would be refused in a cluster.
    sku = _check(instance_type, estimate, requires_bf16, advice, nodes, divided)
    if platform == "local":
        fitting = candidates(estimate, skus, requires_bf16)
        place = _this_place(machine or this_machine(), here or estimate, requires_bf16, advice, skus, fitting)
        unused = f"{instance_type} is not used: this platform runs on this machine"
        return dataclasses.replace(place, notes=(unused,)) if instance_type else place
    unknown = instance_type and find_sku(instance_type, skus) is None
    note = f"nothing is known of {instance_type}: whether it fits, how fast it is, what it costs"
    described = f"{sku.gpus} x {sku.gpu_model}, {sku.gpu_memory_gib:g} GiB each" if sku else "size not known"
    several = f"{nodes} x " if nodes > 1 else ""
    return Place(
        device=f"{several}{instance_type or 'own node'} ({described})",
        device_memory=int(sku.gpu_memory_gib * 2**30) if sku else None,
        usable=usable_bytes(sku) if sku else None,
        instance_type=instance_type or None,
        candidates=candidates(estimate, skus, requires_bf16, nodes=nodes, divided=divided),
        price_usd_hour=sku.price_usd_hour if sku else None,
        price_source=f"({sku.price_region}, {sku.price_date})" if sku and sku.price_usd_hour is not None else "",
        flops_per_second=sku_flops_per_second(sku),
        gpus=sku.gpus if sku else gpus or 1,
        nodes=nodes,
        divided=sku is not None and is_divided(sku, estimate, nodes, divided),
        notes=(note,) if unknown else (),
    )


def _check(
    instance_type: str | None,
    estimate: Estimate,
    requires_bf16: bool,
    advice: Advice,
    nodes: int,
    divided: Divided | None,
) -> Sku | None:
    if not instance_type:
        return None
    return check_instance_type(
        instance_type, estimate, load_skus(), requires_bf16, nodes=nodes, divided=divided, remedy=advice.remedy
    )


def _this_place(
    machine: Machine,
    estimate: Estimate,
    requires_bf16: bool,
    advice: Advice,
    skus: tuple[Sku, ...],
    fitting: tuple[Candidate, ...],
) -> Place:
    if requires_bf16 and machine.gpu_model and machine.compute_capability < BF16_CAPABILITY:
        raise PlanError(
            f"the {machine.gpu_model} of this machine has no bfloat16",
            place=advice.dtype_place,
            hint=f"{advice.dtype_hint}, or hide the GPU: CUDA_VISIBLE_DEVICES=-1",
            code="no-bf16",
        )
    usable = int(machine.device_memory * MACHINE_SHARE)
    if usable < estimate.total:
        sizes = ", ".join(map(str, fitting[:3]))
        raise PlanError(
            f"about {gib(estimate.total)} of memory needed; {machine} has {gib(usable)} to give",
            place=advice.model_place,
            hint=f"{advice.smaller}, or a cluster with one of: {sizes}" if sizes else "a smaller model",
            code="machine-too-small",
        )
    return Place(
        device=str(machine),
        device_memory=machine.device_memory,
        usable=usable,
        instance_type=None,
        candidates=fitting,
        price_usd_hour=0.0,
        price_source="",
        flops_per_second=machine_flops_per_second(machine, skus),
        has_gpu=bool(machine.gpu_model),
    )
