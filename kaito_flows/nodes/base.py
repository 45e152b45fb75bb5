"""What every node provider can do: lease nodes to one run, say whether they are still there, and release them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kaito_flows.workspace import Workspace


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What a Workspace asks for: nodes of a size (empty: any), with labels, with GPUs on each; some preferred by name.

    `any_of` maps a label to the values it may have, from `In` expressions.
    """

    workspace: str
    instance_type: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    any_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    preferred: tuple[str, ...] = ()
    count: int = 1
    gpus: int = 0

    @classmethod
    def of(cls, workspace: Workspace, gpus: int) -> NodeRequest:
        """What `resource` says, with the GPUs that the plan uses on each node; none where the Workspace wants CPUs."""
        resource = workspace.resource
        return cls(
            workspace=workspace.name,
            instance_type=resource.instance_type,
            labels=resource.label_selector.match_labels,
            any_of={e.key: tuple(e.values) for e in resource.label_selector.match_expressions},
            preferred=tuple(resource.preferred_nodes),
            count=resource.count,
            gpus=0 if workspace.gpus == 0 else gpus,
        )


@dataclass(frozen=True, slots=True)
class NodeLease:
    """Nodes that a run may use: which provider leased them, their names and size, what an hour costs in USD.

    Own nodes that are shared may be more than the run needs: Kubernetes chooses among them.
    """

    provider: str
    workspace: str
    nodes: tuple[str, ...]
    instance_type: str
    price_usd_hour: float


class NodeProvider(Protocol):
    """Leases nodes. All calls may be made again: the same request gets the same lease, a release is no fault."""

    def lease(self, request: NodeRequest) -> NodeLease:
        """Return nodes that are ready to run a job.

        Raises:
            SchedulingError: (code `no-node`) there is none, and why.
        """
        ...

    def alive(self, lease: NodeLease) -> bool:
        """Whether the lease's nodes can still take a job."""
        ...

    def release(self, lease: NodeLease) -> None:
        """Give the nodes back."""
        ...
