"""Pools: nodes that a cloud makes under one name for one lease, with whose they are and until when in their tags.

The tags are all the bookkeeping there is: they are written with the request that makes the pool, so that nothing can be
made and not be known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, Protocol

from kaito_flows.nodes.base import Holder, NodeRequest, Offer

POOL_LABEL = "kaito-flows/pool"
"""The label of rented nodes, whose value is their pool's name: they are for those who rent them."""

OURS = "kaito-flows-"
"""What the keys of the tags begin with: the same words in every cloud."""

LeaseState = Literal["leased", "kept", "serving"]
PoolState = Literal["creating", "ready", "failed", "deleting"]

_LEASE_STATES: dict[str, LeaseState] = {"leased": "leased", "kept": "kept", "serving": "serving"}
_DIGITS = 10


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """Whose a pool is; times in UTC, by the cloud's clock.

    `owner` tells installations apart that share a cluster. `state`: leased by a run, kept for the Workspace's next one,
    or serving, which does not expire. `shape` stands for what else was asked for: a kept pool is for the same.
    """

    owner: str
    holder: Holder
    state: LeaseState
    created_at: datetime
    expires_at: datetime
    shape: str = ""

    def as_tags(self) -> dict[str, str]:
        """The record as tags: each key and value fits into an Azure tag and into a Kubernetes annotation."""
        return {
            OURS + "owner": self.owner,
            OURS + "namespace": self.holder.namespace,
            OURS + "workspace": self.holder.workspace,
            OURS + "run": self.holder.run_id,
            OURS + "state": self.state,
            OURS + "created-at": _written(self.created_at),
            OURS + "expires-at": _written(self.expires_at),
            OURS + "shape": self.shape,
        }

    @classmethod
    def from_tags(cls, tags: Mapping[str, str] | None) -> LeaseRecord | None:
        """The inverse of `as_tags`; None for others, and damaged ones: such a pool is nobody's to delete."""
        found = tags or {}
        try:
            state = _LEASE_STATES[found[OURS + "state"]]
            return cls(
                owner=found[OURS + "owner"],
                holder=Holder(found[OURS + "namespace"], found[OURS + "workspace"], found[OURS + "run"]),
                state=state,
                created_at=_read(found[OURS + "created-at"]),
                expires_at=_read(found[OURS + "expires-at"]),
                shape=found.get(OURS + "shape", ""),
            )
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes of one size under one name, as the cloud tells of them.

    `reason` is why it failed, or what is being waited for, in the cloud's words; `code` is the error's for a failure.
    `version` changes with each change to the pool.
    """

    name: str
    offer: Offer
    count: int
    state: PoolState
    record: LeaseRecord
    reason: str = ""
    code: str = "no-capacity"
    version: str = ""


class Cloud(Protocol):
    """Where pools are made: what `RentedNodes` needs to be told and done. Blocking calls, each a few requests.

    Raised by every call:

        CloudError: it does not answer (after tries of its own); code `cloud-busy`: not now, because of another
            operation.
        AccessError: it says no, and which right is missing.
    """

    kind: str
    """`aks`, `karpenter`."""

    throttles: bool
    """Whether who asks often is kept waiting: then a pool is looked at ever more rarely, and leases last longer."""

    look_seconds: float
    """How long a pool that is being made is left alone before `look` is called."""

    def now(self) -> datetime:
        """The cloud's time: this machine's clock may be wrong."""
        ...

    def against(self, offers: Sequence[Offer], count: int) -> Mapping[Offer, str]:
        """What speaks against offers: not offered here, restricted, no quota, with the number that is short."""
        ...

    def pools(self) -> list[Pool]:
        """All pools that carry a record, whoever owns them."""
        ...

    def create(self, name: str, offer: Offer, request: NodeRequest, record: LeaseRecord) -> Pool:
        """Ask for a pool; one of that name that is there is returned as it is, if it carries a record.

        Raises:
            CapacityError: it cannot be had now; nothing, or a failed pool of that name, is left behind.
            InputError: (code `pool-taken`) one of that name is there that is not ours.
        """
        ...

    def look(self, name: str) -> Pool | None:
        """The pool as it is now; None if it is gone."""
        ...

    def mark(self, pool: Pool, record: LeaseRecord) -> Pool:
        """Write another record, and return the pool as it then is.

        Raises:
            LeaseLostError: somebody has changed or removed the pool since it was looked at.
        """
        ...

    def delete(self, pool: Pool) -> None:
        """Ask for the pool to be removed, and do not wait for it; one that is gone, or on its way, is no fault.

        Raises:
            LeaseLostError: somebody has changed its record since it was looked at.
        """
        ...

    def node_labels(self, name: str) -> Mapping[str, str]:
        """The labels by which Kubernetes' nodes of the pool are found."""
        ...


def pool_name(owner: str, holder: Holder, offer: Offer, attempt: int = 0) -> str:
    """The name of a run's pool: 12 characters that every cloud takes, the same for the same run and offer."""
    said = "\n".join((owner, holder.namespace, holder.workspace, holder.run_id, str(offer), str(attempt)))
    return "kf" + hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]


def shape_of(request: NodeRequest) -> str:
    """What a pool was asked for besides its size: the disk, and the labels."""
    said = "\n".join((str(request.disk_bytes), *(f"{key}={value}" for key, value in sorted(request.labels.items()))))
    return hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]


def _written(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text}: of which time zone?")
    return found
