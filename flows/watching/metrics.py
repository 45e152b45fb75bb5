"""What the Workspaces' statuses say, as metrics for Prometheus: taken from the watch that is held anyway.

kaito_flows_workspace_cost_usd{namespace, workspace}                USD that the last run's nodes cost
kaito_flows_workspace_gpu_hours{namespace, workspace}               GPU hours that they were paid for
kaito_flows_workspace_gpu_training_share{namespace, workspace}      the share of the paid time that was training
kaito_flows_workspaces{state}                                       how many Workspaces are in that state
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kaito_flows.errors import PortTakenError
from kaito_flows.flows.watching.slim_kopf import kopf

STATES = ("Pending", "Running", "Ready", "NotReady", "Succeeded", "Failed", "Stopped")
_COSTS = {
    "usd": ("kaito_flows_workspace_cost_usd", "USD that the nodes of the last run cost."),
    "gpuHours": ("kaito_flows_workspace_gpu_hours", "GPU hours that the nodes of the last run were paid for."),
    "trainingShare": (
        "kaito_flows_workspace_gpu_training_share",
        "The share of the paid time of the last run's nodes in which they were training.",
    ),
}


@dataclass(frozen=True, slots=True)
class _Seen:
    namespace: str
    name: str
    state: str
    cost: Mapping[str, float]


class WorkspaceMetrics(Collector):
    """The metrics of the Workspaces that were seen last. Threads can share it."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    async def observe(self, type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        """Take an event of Kopf's watch; of a Workspace that is being deleted, nothing is told any more."""
        metadata, status = body["metadata"], body.get("status") or {}
        with self._lock:
            if type == "DELETED" or metadata.get("deletionTimestamp"):
                self._seen.pop(metadata["uid"], None)
                return
            cost = {key: float(value) for key, value in (status.get("cost") or {}).items() if key in _COSTS}
            state = status.get("state") or "Pending"
            self._seen[metadata["uid"]] = _Seen(metadata["namespace"], metadata["name"], state, cost)

    def watch(self, registry: kopf.OperatorRegistry, *resource: str) -> None:
        """Hear of the resource's events through Kopf's registry."""
        kopf.on.event(*resource, registry=registry, id="metrics")(self.observe)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; what a status does not say has no series."""
        with self._lock:
            # By name: of two objects that had it one after the other, the later.
            seen = {(one.namespace, one.name): one for one in self._seen.values()}
        for key, (name, help_) in _COSTS.items():
            family = GaugeMetricFamily(name, help_, labels=("namespace", "workspace"))
            for one in seen.values():
                if key in one.cost:
                    family.add_metric((one.namespace, one.name), one.cost[key])
            yield family
        states = Counter(one.state for one in seen.values())
        count = GaugeMetricFamily("kaito_flows_workspaces", "How many Workspaces are in a state.", labels=("state",))
        for state in dict.fromkeys((*STATES, *states)):
            count.add_metric((state,), states[state])
        yield count

    @contextlib.contextmanager
    def served(self, port: int) -> Iterator[None]:
        """Answer `GET /metrics` at the port while the block lasts; at port 0, nowhere.

        Raises:
            PortTakenError: another process listens there.
        """
        if not port:
            yield
            return
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, thread = start_http_server(port, registry=registry)
        except OSError as exc:
            hint = "KAITO_FLOWS_METRICS_PORT names another, 0 none"
            raise PortTakenError(f"port {port}: {exc.strerror}", place="metrics", hint=hint) from exc
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
