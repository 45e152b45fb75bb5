"""A cloud in memory, as `Cloud` promises one, and the cluster that its nodes join: for tests of what is above them.

It has a clock of its own, and goes wrong on demand: `cloud.faults["delete"] = [CloudError("…"), None]` makes the next
deletion fail and the one after it succeed; `cloud.before["delete"] = act` calls `act` once, before the next deletion.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kaito_flows.cluster.labels import labels as labels_of
from kaito_flows.errors import InputError, LeaseLostError
from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.pools import LeaseRecord, LeaseState, Pool, PoolState

SIZE = "Standard_NC24ads_A100_v4"
# Long ago, so that nothing passes that asks this machine's clock.
START = datetime(2001, 1, 1, 12, 0, tzinfo=UTC)


class FakeCloud:
    """Pools in a dict. A new one is `ready` at once, or `creating` until `settle`; a deleted one goes at `settle`."""

    throttles = False
    look_seconds = 0.0

    def __init__(self, kind: str = "karpenter", *, now: datetime = START, boots_at_once: bool = True) -> None:
        self.kind = kind
        self.time = now
        self.boots_at_once = boots_at_once
        self.there: dict[str, Pool] = {}
        self.foreign: set[str] = set()
        self.refused: dict[Offer, str] = {}
        self.faults: defaultdict[str, list[Exception | None]] = defaultdict(list)
        self.before: dict[str, Callable[[], object]] = {}
        self.calls: list[str] = []
        self._version = 0
        self._lock = threading.RLock()

    # --- for tests ----------------------------------------------------------------------------------------------------

    def advance(self, **span: float) -> None:
        """Let time pass: `advance(minutes=5)`."""
        self.time += timedelta(**span)

    def settle(self) -> None:
        """What was asked for has happened: pools are ready, or gone."""
        with self._lock:
            self.there = {name: pool for name, pool in self.there.items() if pool.state != "deleting"}
            for name, pool in self.there.items():
                if pool.state == "creating":
                    self._put(replace(pool, state="ready"))
                    assert name in self.there

    def fail(self, name: str, reason: str, code: str = "no-capacity") -> None:
        """A pool fails, as after an eviction."""
        self._put(replace(self.there[name], state="failed", reason=reason, code=code))

    def add(
        self,
        name: str,
        run_id: str = "",
        *,
        state: LeaseState = "leased",
        workspace: str = "w",
        namespace: str = "team",
        owner: str = "kaito-flows",
        age: float = 10.0,
        left: float = 50.0,
        pool_state: PoolState = "ready",
        offer: Offer | None = None,
        count: int = 1,
        shape: str = "",
    ) -> Pool:
        """A pool that is there: `age` minutes old, with `left` minutes until its record expires."""
        created, expires = self.time - timedelta(minutes=age), self.time + timedelta(minutes=left)
        record = LeaseRecord(owner, Holder(namespace, workspace, run_id), state, created, expires, shape)
        return self._put(Pool(name, offer or Offer(SIZE, 1, price_usd_hour=3.6), count, pool_state, record))

    @property
    def alive(self) -> list[str]:
        """The names of the pools that nobody has asked to remove."""
        return [name for name, pool in self.there.items() if pool.state != "deleting"]

    # --- Cloud --------------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        return self.time

    def against(self, offers: Sequence[Offer], count: int) -> Mapping[Offer, str]:
        self._called("against")
        return {offer: self.refused[offer] for offer in offers if offer in self.refused}

    def pools(self) -> list[Pool]:
        self._called("pools")
        with self._lock:
            return list(self.there.values())

    def create(self, name: str, offer: Offer, request: NodeRequest, record: LeaseRecord) -> Pool:
        self._called("create")
        with self._lock:
            if name in self.foreign:
                raise InputError("is there, and not ours", place=name, code="pool-taken")
            if name in self.there:
                return self.there[name]
            state: PoolState = "ready" if self.boots_at_once else "creating"
            return self._put(Pool(name, offer, request.count, state, _as_stored(record)))

    def look(self, name: str) -> Pool | None:
        self._called("look")
        return self.there.get(name)

    def mark(self, pool: Pool, record: LeaseRecord) -> Pool:
        self._called("mark")
        with self._lock:
            found = self.there.get(pool.name)
            if found is None or found.version != pool.version:
                raise LeaseLostError("was changed, or removed", place=pool.name)
            return self._put(replace(found, record=_as_stored(record)))

    def delete(self, pool: Pool) -> None:
        self._called("delete")
        with self._lock:
            found = self.there.get(pool.name)
            if found is None or found.state == "deleting":
                return
            if found.record != pool.record:
                raise LeaseLostError("its record was changed", place=pool.name)
            self._put(replace(found, state="deleting"))

    def node_labels(self, name: str) -> Mapping[str, str]:
        return {"fake-cloud/pool": name}

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if act := self.before.pop(method, None):
            act()
        if self.faults[method] and (fault := self.faults[method].pop(0)):
            raise fault

    def _put(self, pool: Pool) -> Pool:
        with self._lock:
            self._version += 1
            self.there[pool.name] = replace(pool, version=str(self._version))
            return self.there[pool.name]


def _as_stored(record: LeaseRecord) -> LeaseRecord:
    """The record as it comes back from tags."""
    found = LeaseRecord.from_tags(record.as_tags())
    assert found is not None
    return found


class FakeCluster:
    """The objects of a cluster that the nodes of some clouds have joined, as far as providers and the reaper ask."""

    def __init__(self, *clouds: FakeCloud, objects: Sequence[Mapping[str, Any]] = ()) -> None:
        self.clouds = clouds
        self.objects = list(objects)
        self.namespace = "kaito-flows"
        self.faults: dict[tuple[str, str], Exception] = {}
        """What a namespace answers when one of its kinds is asked for: `("team", "Deployment")`."""

    def within(self, namespace: str) -> FakeCluster:
        found = FakeCluster(*self.clouds)
        found.objects, found.namespace, found.faults = self.objects, namespace, self.faults
        return found

    def get(self, kind: str, name: str) -> Mapping[str, Any] | None:
        found = [item for item in self._of(kind) if item["metadata"]["name"] == name]
        return found[0] if found else None

    def list(self, kind: str, *, labels: Mapping[str, str] | None = None) -> list[Mapping[str, Any]]:
        wanted = (labels or {}).items()
        return [item for item in self._of(kind) if wanted <= item["metadata"].get("labels", {}).items()]

    def _of(self, kind: str) -> list[Mapping[str, Any]]:
        if fault := self.faults.get((self.namespace, kind)):
            raise fault
        if kind == "Node":
            return [node for cloud in self.clouds for pool in cloud.there.values() for node in _nodes(cloud, pool)]
        anywhere = kind == "Namespace"
        return [
            item
            for item in self.objects
            if item["kind"] == kind and (anywhere or item["metadata"].get("namespace") == self.namespace)
        ]


def _nodes(cloud: FakeCloud, pool: Pool) -> list[Mapping[str, Any]]:
    if pool.state != "ready":
        return []
    room = {"nvidia.com/gpu": str(pool.offer.gpus)}
    status = {"conditions": [{"type": "Ready", "status": "True"}], "capacity": room, "allocatable": room}
    size = {"node.kubernetes.io/instance-type": pool.offer.instance_type}
    names = [f"{pool.name}-{i}" for i in range(pool.count)]
    return [
        {
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {**cloud.node_labels(pool.name), **size, "kubernetes.io/hostname": name},
            },
            "status": status,
        }
        for name in names
    ]


def workspace_object(name: str = "w", namespace: str = "team") -> dict[str, Any]:
    """A Workspace that is there."""
    return {"kind": "Workspace", "metadata": {"name": name, "namespace": namespace}}


def service_object(nodes: Sequence[str] = (), workspace: str = "w", namespace: str = "team") -> dict[str, Any]:
    """A Workspace's service: a Deployment, pinned to those nodes if any are named."""
    terms = [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": list(nodes)}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    pod = {"affinity": {"nodeAffinity": required}} if nodes else {}
    metadata = {"name": f"{workspace}-1", "namespace": namespace, "labels": labels_of(workspace, "server")}
    return {"kind": "Deployment", "metadata": metadata, "spec": {"template": {"spec": pod}}}


def pod_object(node: str, workspace: str = "w", namespace: str = "team") -> dict[str, Any]:
    """A pod of a Workspace's service, on that node or, without one, on none yet."""
    metadata = {"name": f"{workspace}-1-x", "namespace": namespace, "labels": labels_of(workspace, "server")}
    return {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": node} if node else {}}
