"""What every node provider can do: lease nodes to one run, renew and release them, and say which it has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from threading import Event
from typing import Any, Protocol

from kaito_flows.workspace import Workspace

Tell = Callable[[str, dict[str, Any]], None]
"""Hears of each try and each wait: a name, as in `"waiting for the node"`, and facts as JSON has them."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A node that could be rented: its size, the GPUs to use on each, on-demand or spot, a zone (empty: any).

    The price is in USD an hour for one node; None where it is not known.
    """

    instance_type: str
    gpus: int = 0
    spot: bool = False
    zone: str = ""
    price_usd_hour: float | None = None

    def __str__(self) -> str:
        zone = f" in zone {self.zone}" if self.zone else ""
        return f"{self.instance_type}{' (spot)' if self.spot else ''}{zone}"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has leased nodes: a flow run, for a Workspace."""

    namespace: str
    workspace: str
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class NodeRequest:
    """What a Workspace asks for: nodes of a size (empty: any), with labels, with GPUs on each; some preferred by name.

    `any_of` maps a label to the values it may have, from `In` expressions. What else could be rented, in the order in
    which it is tried, are the `offers`. `run_id` is who asks: the same run gets the same nodes again.
    """

    workspace: str
    instance_type: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    any_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    preferred: tuple[str, ...] = ()
    count: int = 1
    gpus: int = 0
    namespace: str = ""
    run_id: str = ""
    offers: tuple[Offer, ...] = ()
    disk_bytes: int = 0

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        gpus: int,
        *,
        namespace: str = "",
        run_id: str = "",
        offers: Sequence[Offer] = (),
        disk_bytes: int = 0,
    ) -> NodeRequest:
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
            namespace=namespace,
            run_id=run_id,
            offers=tuple(offers),
            disk_bytes=disk_bytes,
        )

    @property
    def holder(self) -> Holder:
        """Who asks."""
        return Holder(self.namespace, self.workspace, self.run_id)

    def after(self, lost: NodeLease) -> NodeRequest:
        """What is asked for when a lease was lost: the offers behind that one; when it was the last, all once more."""
        held = (lost.instance_type, lost.spot, lost.zone)
        places = [i for i, o in enumerate(self.offers) if (o.instance_type, o.spot, o.zone) == held]
        rest = self.offers[places[0] + 1 :] if places else self.offers
        return replace(self, offers=rest or self.offers)


@dataclass(frozen=True, slots=True)
class NodeLease:
    """Nodes that a run may use: which provider leased them, their names and size, what an hour of each costs in USD.

    Own nodes that are shared may be more than the run needs: Kubernetes chooses among them. Of rented ones there are
    also their pool's name, the run that has it, when it was asked for, ready and leased, and when the lease ends (UTC).
    """

    provider: str
    workspace: str
    nodes: tuple[str, ...]
    instance_type: str
    price_usd_hour: float | None
    name: str = ""
    run_id: str = ""
    gpus: int = 0
    spot: bool = False
    zone: str = ""
    created_at: datetime | None = None
    ready_at: datetime | None = None
    leased_at: datetime | None = None
    expires_at: datetime | None = None

    @property
    def is_rented(self) -> bool:
        """Whether it must be given back."""
        return self.expires_at is not None


class NodeProvider(Protocol):
    """Leases nodes. All calls may be made again: the same request gets the same lease, a release is no fault."""

    def check(self, request: NodeRequest) -> Mapping[str, str]:
        """Return what speaks against each offer, by its text; none is rented. What can be had is not in there.

        Raises:
            SchedulingError: (code `no-node`) none can be had, and what is short.
        """
        ...

    def lease(self, request: NodeRequest, tell: Tell, stop: Event | None = None) -> NodeLease:
        """Return nodes that are ready to run a job. Who sets `stop` no longer wants them.

        Raises:
            SchedulingError: (code `no-node`) there is none, and why; (code `lease-abandoned`) `stop` was set.
        """
        ...

    def renew(self, lease: NodeLease, *, followed: bool = False) -> NodeLease:
        """Extend the lease, whose run lives, if it ends soon.

        Args:
            lease: the run's.
            followed: whether the reaper's Prefect knows the run and hears of its end. Then the lease may be a long one.

        Raises:
            LeaseLostError: it is no longer the run's.
        """
        ...

    def alive(self, lease: NodeLease) -> bool:
        """Whether the lease's nodes can still take a job."""
        ...

    def release(self, holder: Holder, *, keep: bool = False) -> None:
        """Give back all that the run has leased; with `keep`, after the grace time that the settings have.

        A holder without a run is the whole Workspace: what its service has goes, too.
        """
        ...

    def hand_over(self, holder: Holder, nodes: Sequence[str]) -> None:
        """Leave these nodes to the Workspace's service, which runs there; give back those that it had before."""
        ...
