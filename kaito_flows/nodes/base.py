"""What every node provider can do: lease nodes to one run, and release them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class NodeLease:
    """Nodes that belong to one run: which provider leased them, their names and size, what an hour costs in USD."""

    provider: str
    workspace: str
    nodes: tuple[str, ...]
    instance_type: str
    price_usd_hour: float


class NodeProvider(Protocol):
    """Leases nodes. Both calls may be made again: the same workspace gets the same lease, a release is no fault."""

    def lease(self, workspace: str, instance_type: str) -> NodeLease:
        """Return nodes of that size, ready to run a job."""
        ...

    def release(self, lease: NodeLease) -> None:
        """Give the nodes back."""
        ...
