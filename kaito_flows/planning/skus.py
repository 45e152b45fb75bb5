"""Which GPU sizes can do it, and what is wrong with the one that a Workspace names."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kaito_flows.errors import PlanError
from kaito_flows.presets.loader import Sku

__all__ = [
    "Candidate",
    "Divided",
    "Estimate",
    "candidates",
    "check_instance_type",
    "find_sku",
    "is_divided",
    "usable_bytes",
]


class Estimate(Protocol):
    """What is needed of a GPU's memory, in bytes."""

    @property
    def total(self) -> int:
        """All of it."""
        ...


Divided = Callable[[int], Estimate]
"""What each of so many GPUs must hold where the model is divided among them."""

# Of a GPU's nominal memory the driver and error correction keep a part: an A10's 24 GiB show as 22.5, a T4's 16 as 15.
USABLE_SHARE = 0.93
_PLACE = "resource.instanceType"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A GPU size that fits: bytes left on one GPU, and USD an hour for the whole node (None: no known price).

    `divided`: not on one GPU, but with a part of the model on each.
    """

    sku: Sku
    free: int
    price_usd_hour: float | None
    divided: bool = False

    def __str__(self) -> str:
        price = f"{self.price_usd_hour:.2f} USD/h" if self.price_usd_hour is not None else "price not known"
        return f"{self.sku.name} ({_gpus(self.sku)}, {price}{', divided among the GPUs' if self.divided else ''})"


def usable_bytes(sku: Sku) -> int:
    """Bytes that a program can have on one of the size's GPUs."""
    return int(sku.gpu_memory_gib * 2**30 * USABLE_SHARE)


def candidates(
    estimate: Estimate,
    skus: Sequence[Sku],
    requires_bf16: bool,
    *,
    nodes: int = 1,
    divided: Divided | None = None,
    today: datetime.date | None = None,
) -> tuple[Candidate, ...]:
    """Return the sizes of which `nodes` can do it, cheapest first, those without a price last.

    One GPU must hold all of it, for each has the whole model; where it can be `divided`, those sizes count too on which
    each GPU holds its part.
    """
    found = []
    for sku in skus:
        needed = _needed(sku, estimate, nodes, divided)
        if not _faults(sku, needed, requires_bf16, today or _today()):
            in_parts = is_divided(sku, estimate, nodes, divided)
            found.append(Candidate(sku, usable_bytes(sku) - needed, sku.price_usd_hour, in_parts))
    return tuple(sorted(found, key=_cheapest_first))


def is_divided(sku: Sku, estimate: Estimate, nodes: int = 1, divided: Divided | None = None) -> bool:
    """Whether, on nodes of this size, the model must be divided among the GPUs, and can be."""
    return divided is not None and sku.gpus * nodes > 1 and usable_bytes(sku) < estimate.total


def find_sku(name: str, skus: Sequence[Sku]) -> Sku | None:
    """Return the size with that name, in any case, as Azure takes it."""
    return next((sku for sku in skus if sku.name.lower() == name.lower()), None)


def check_instance_type(
    name: str,
    estimate: Estimate,
    skus: Sequence[Sku],
    requires_bf16: bool,
    *,
    nodes: int = 1,
    divided: Divided | None = None,
    remedy: str = "use qlora, a shorter max_length, or gradient_checkpointing: true",
    today: datetime.date | None = None,
) -> Sku | None:
    """Return the named size if it can do it; None for one that is not known but that KAITO on Azure lets pass.

    Raises:
        PlanError: code `unknown-instance-type`, `no-bf16`, `gpu-too-small` or `retired-instance-type`; the hint names
            the cheapest sizes that can, or the `remedy` where none can.
    """
    today = today or _today()
    fitting = candidates(estimate, skus, requires_bf16, nodes=nodes, divided=divided, today=today)
    cheapest = ", ".join(map(str, fitting[:3]))
    hint = f"cheapest that can: {cheapest}" if cheapest else f"no known size holds it on one GPU: {remedy}"
    sku = find_sku(name, skus)
    if sku is None:
        # KAITO's webhook lets every Standard_N* and Standard_D* pass on Azure, for sizes newer than its list.
        if name.lower().startswith(("standard_n", "standard_d")):
            return None
        near = difflib.get_close_matches(name, [sku.name for sku in skus], n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise PlanError(f"unknown size {name!r}", place=_PLACE, hint=meant + hint, code="unknown-instance-type")
    if faults := _faults(sku, _needed(sku, estimate, nodes, divided), requires_bf16, today):
        message = f"{sku.name} ({_gpus(sku)}) {'; '.join(message for _, message in faults)}"
        raise PlanError(message, place=_PLACE, hint=hint, code=faults[0][0])
    return sku


def _needed(sku: Sku, estimate: Estimate, nodes: int, divided: Divided | None) -> int:
    """Bytes that one GPU of the size must hold: all, or its part where that is the only way."""
    if divided is not None and is_divided(sku, estimate, nodes, divided):
        return divided(sku.gpus * nodes).total
    return estimate.total


def _faults(sku: Sku, needed: int, requires_bf16: bool, today: datetime.date) -> list[tuple[str, str]]:
    """What speaks against a size: codes with messages, the one that no change of settings cures first."""
    faults = []
    if requires_bf16 and not sku.bf16:
        faults.append(("no-bf16", f"has no bfloat16 (compute capability {sku.compute_capability}, 8.0 is needed)"))
    if usable_bytes(sku) < needed:
        message = f"is too small: {needed / 2**30:.1f} GiB needed, {usable_bytes(sku) / 2**30:.1f} GiB usable on a GPU"
        faults.append(("gpu-too-small", message))
    if sku.retires is not None and sku.retires <= today:
        faults.append(("retired-instance-type", f"was retired by Azure on {sku.retires}"))
    return faults


def _cheapest_first(candidate: Candidate) -> tuple[float, str]:
    price = candidate.price_usd_hour
    return (price if price is not None else float("inf"), candidate.sku.name)


def _gpus(sku: Sku) -> str:
    return f"{sku.gpus} x {sku.gpu_model.removeprefix('NVIDIA ')}, {sku.gpu_memory_gib:g} GiB"


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()
