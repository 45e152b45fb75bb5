"""A cloud, nodes and pods that take as long as real ones are said to, in minutes that pass faster.

The pipeline above them is the product's own: flow, tasks, tenancy, `RentedNodes`. Simulated is only what takes time
elsewhere: a node that boots, an image that is pulled, weights and data that are downloaded, a training.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from kaito_flows.nodes.aks import AksPools
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.pools import LeaseRecord, Pool
from kaito_flows.oci.images import build_image, open_repository
from kaito_flows.platforms import Event, JobSpec, LocalPlatform, Weights


@dataclass(frozen=True)
class Minutes:
    """What each stage takes, in minutes; `scale` are the seconds that one of them lasts here."""

    node: float = 4
    image: float = 1
    weights: float = 3
    dataset: float = 5
    training: float = 20
    scale: float = 3

    def pass_by(self, minutes: float) -> None:
        """Wait so long."""
        time.sleep(max(minutes, 0) * self.scale)

    @property
    def sequential(self) -> float:
        """Minutes to the first step, one stage after the other."""
        return self.node + self.image + self.weights + self.dataset

    @property
    def chain(self) -> float:
        """The longest chain of stages that need each other: a node, then image beside weights; data beside all."""
        return max(self.node + max(self.image, self.weights), self.dataset)


class Clock:
    """When things happened, in simulated minutes from the start."""

    def __init__(self, minutes: Minutes) -> None:
        self._scale, self._start = minutes.scale, time.monotonic()
        self.at: dict[str, float] = {}

    def mark(self, what: str) -> None:
        """Remember that it happened now, for the first time."""
        self.at.setdefault(what, (time.monotonic() - self._start) / self._scale)


class SimulatedCloud:
    """Pools in memory, whose nodes boot for a while. `Cloud` says what each method promises."""

    kind = "aks"
    throttles = True

    def __init__(self, minutes: Minutes, clock: Clock) -> None:
        self.look_seconds = AksPools.look_seconds * minutes.scale / 60
        self._minutes, self._clock = minutes, clock
        self._pools: dict[str, tuple[Pool, float]] = {}
        self.calls: list[str] = []

    def now(self) -> datetime:
        """This machine's time."""
        return datetime.now(UTC)

    def against(self, offers: Sequence[Offer], count: int) -> Mapping[Offer, str]:
        """Nothing speaks against any offer; three calls, as AKS takes."""
        self.calls += ["read cluster", "list sizes", "list usages"]
        return {}

    def pools(self) -> list[Pool]:
        """All pools."""
        self.calls.append("list pools")
        return [pool for pool, _ in self._pools.values()]

    def create(self, name: str, offer: Offer, request: NodeRequest, record: LeaseRecord) -> Pool:
        """A pool whose nodes join when they have booted."""
        self.calls.append("create")
        pool = Pool(name, offer, request.count, "creating", record)
        ready = time.monotonic() + self._minutes.node * self._minutes.scale
        self._pools[name] = pool, ready
        self._clock.mark("node asked for")
        return pool

    def look(self, name: str) -> Pool | None:
        """The pool."""
        self.calls.append("look")
        return self._pools[name][0] if name in self._pools else None

    def mark(self, pool: Pool, record: LeaseRecord) -> Pool:
        """The pool with another record."""
        self.calls.append("mark")
        marked = replace(self._pools[pool.name][0], record=record)
        self._pools[pool.name] = marked, self._pools[pool.name][1]
        return marked

    def delete(self, pool: Pool) -> None:
        """The pool is gone at once."""
        self.calls.append("delete")
        self._clock.mark("release asked for")
        del self._pools[pool.name]

    def node_labels(self, name: str) -> Mapping[str, str]:
        """What its nodes carry."""
        return {"pool": name}

    # The cluster that its nodes join.

    def within(self, namespace: str) -> SimulatedCloud:
        """A namespace, in which there is nothing."""
        return self

    def list(self, kind: str, *, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The nodes that have joined."""
        if kind != "Node":
            return []
        wanted = (labels or {}).get("pool")
        found = [p for p, ready in self._pools.values() if time.monotonic() > ready and wanted in (None, p.name)]
        if found:
            self._clock.mark("node ready")
        room = {"nvidia.com/gpu": "8"}
        ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": room, "capacity": room}
        return [
            {"metadata": {"name": p.name, "labels": {"kubernetes.io/hostname": p.name}}, "status": ready} for p in found
        ]


class SimulatedPlatform(LocalPlatform):
    """This machine's platform, with pods that take their time on nodes that have nothing yet."""

    kind: Literal["local", "kubernetes"] = "local"

    def __init__(self, settings: Any, minutes: Minutes, clock: Clock, *, warm: bool) -> None:
        super().__init__(settings)
        self._minutes, self._clock, self._warm = minutes, clock, warm
        self._there: dict[tuple[str, str], threading.Event] = {}

    def warm_up(self, workspace: str, nodes: Sequence[str], weights: Weights) -> None:
        """The image is pulled while the weights are downloaded, as by the pod of `pods.warm_job`."""
        if self._warm:
            for node in nodes:
                for what in ("image", "weights"):
                    threading.Thread(target=self._bring, args=(node, what), daemon=True).start()

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Pull what the node does not have, one after the other; train; leave an adapter behind."""
        for what in ("image", "weights"):
            for node in spec.placement.nodes:
                self._bring(node, what)
        self._clock.mark("first step")
        self._minutes.pass_by(self._minutes.training)
        self._clock.mark("trained")
        metrics = {"evaluation": {"before": None, "after": None}, "training": {"steps": 1}, "history": []}
        build_image(
            open_repository(str(spec.arguments["output"])),
            [{"data/metrics.json": json.dumps(metrics).encode()}],
            annotations={"io.kaito-flows.identity": str(spec.arguments["identity"])},
            tag=str(spec.arguments["output"]).rpartition(":")[2],
        )
        seconds = self._minutes.training * self._minutes.scale
        return {"event": "completed", "timings": {"steps_seconds": seconds}}

    def _bring(self, node: str, what: str) -> None:
        there = self._there.get((node, what))
        if there is None:
            self._there[node, what] = there = threading.Event()
            self._minutes.pass_by(getattr(self._minutes, what))
            self._clock.mark(f"{what} on the node")
            there.set()
        there.wait()
