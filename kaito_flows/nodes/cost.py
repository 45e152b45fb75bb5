"""What a run's nodes have cost, and how much of the time that was paid for went into training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from kaito_flows.nodes.base import NodeLease
from kaito_flows.planning.skus import find_sku
from kaito_flows.presets.loader import load_skus


@dataclass(frozen=True, slots=True)
class PaidLease:
    """A lease and when it ended, by the clock by which it began."""

    lease: NodeLease
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What all nodes of a run came to.

    `usd` and `gpu_hours` count from when a node was asked for, with all of its GPUs; `usd` is None where a price is not
    known. `boot_seconds` is the part before the nodes were ready, `paid_seconds` the part after; both are sums over
    leases, not nodes. `training_share` is the part of the paid time that was spent in training steps; None where
    nothing was paid.
    """

    usd: float | None = 0.0
    gpu_hours: float = 0.0
    paid_seconds: float = 0.0
    boot_seconds: float = 0.0
    training_share: float | None = None

    @classmethod
    def of(cls, leases: Iterable[PaidLease]) -> NodeCost:
        """Add the leases up; nothing is known of the training yet."""
        total = cls()
        for paid in leases:
            total = total.plus(paid)
        return total

    @classmethod
    def from_dict(cls, raw: dict[str, Any] | None) -> NodeCost:
        """The inverse of `as_dict`; nothing stands for no cost."""
        return cls(**{key: value for key, value in raw.items() if value is not None or key == "usd"}) if raw else cls()

    def plus(self, paid: PaidLease) -> NodeCost:
        """Return the cost with one more lease."""
        lease = paid.lease
        if lease.ready_at is None:
            return self
        begun = lease.created_at or lease.ready_at
        hours = max((paid.ended_at - begun).total_seconds(), 0.0) / 3600 * len(lease.nodes)
        price, sku = lease.price_usd_hour, find_sku(lease.instance_type, load_skus()) if lease.is_rented else None
        return replace(
            self,
            usd=None if self.usd is None or price is None else self.usd + hours * price,
            gpu_hours=self.gpu_hours + hours * (sku.gpus if sku else lease.gpus),
            paid_seconds=self.paid_seconds + max((paid.ended_at - lease.ready_at).total_seconds(), 0.0),
            boot_seconds=self.boot_seconds + max((lease.ready_at - begun).total_seconds(), 0.0),
        )

    def __add__(self, other: NodeCost) -> NodeCost:
        """The cost of both; the share of training is of neither."""
        return NodeCost(
            usd=None if self.usd is None or other.usd is None else self.usd + other.usd,
            gpu_hours=self.gpu_hours + other.gpu_hours,
            paid_seconds=self.paid_seconds + other.paid_seconds,
            boot_seconds=self.boot_seconds + other.boot_seconds,
        )

    @property
    def training_seconds(self) -> float:
        """The paid seconds that were spent in training steps."""
        return self.paid_seconds * (self.training_share or 0.0)

    def trained(self, seconds: float) -> NodeCost:
        """Return the cost with the share of so many seconds of training, those before a checkpoint of it included."""
        share = min(seconds / self.paid_seconds, 1.0) if self.paid_seconds > 0 else None
        return replace(self, training_share=share)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, rounded to what matters."""
        share = self.training_share
        return {
            "usd": None if self.usd is None else round(self.usd, 4),
            "gpu_hours": round(self.gpu_hours, 4),
            "paid_seconds": round(self.paid_seconds, 1),
            "boot_seconds": round(self.boot_seconds, 1),
            "training_share": None if share is None else round(share, 4),
        }

    def rows(self) -> list[dict[str, str]]:
        """As rows for people: `item` and `value`."""
        share = self.training_share
        return [
            {"item": "cost", "value": "not known" if self.usd is None else f"{self.usd:.2f} USD"},
            {"item": "GPU hours", "value": f"{self.gpu_hours:.2f}"},
            {"item": "nodes booted for", "value": f"{self.boot_seconds:.0f} s"},
            {"item": "nodes held for", "value": f"{self.paid_seconds:.0f} s"},
            {"item": "of that in training", "value": "not known" if share is None else f"{share:.0%}"},
        ]
