"""The metrics that the watcher serves, asked for over HTTP as Prometheus asks."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import PortTakenError
from kaito_flows.flows.watching.metrics import WorkspaceMetrics
from kaito_flows.workspace.status import WorkspaceStatus, status_resource

COST = {"usd": 1.25, "gpu_hours": 0.5, "training_share": 0.75, "paid_seconds": 1800.0, "boot_seconds": 240.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def body(name: str = "w", uid: str = "", *, state: str = "Succeeded", cost: dict[str, Any] | None = None) -> Any:
    status = WorkspaceStatus(name, "kaito.sh/v1beta1", "", state=state, facts={"cost": cost} if cost else {})
    return {
        "metadata": {"name": name, "namespace": "team", "uid": uid or name},
        "status": status_resource(status),
    }


def see(metrics: WorkspaceMetrics, body: Any, type_: str | None = "MODIFIED") -> None:
    asyncio.run(metrics.observe(type=type_, body=body))


class Scrape:
    """What Prometheus gets."""

    def __init__(self, port: int) -> None:
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5)
        assert answer.status_code == 200
        families = [*text_string_to_metric_families(answer.text)]
        assert {f.type for f in families} == {"gauge"}
        self.series = {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}
        assert len(self.series) == sum(len(f.samples) for f in families), "no series is there twice"

    def of(self, metric: str, name: str = "w") -> float | None:
        key = (f"kaito_flows_workspace_{metric}", ("namespace", "team"), ("workspace", name))
        return self.series.get(key)  # type: ignore[arg-type]

    def workspaces(self, state: str) -> float | None:
        return self.series.get(("kaito_flows_workspaces", ("state", state)))  # type: ignore[arg-type]


def test_what_the_statuses_say_is_served_and_goes_with_the_workspace() -> None:
    metrics, port = WorkspaceMetrics(), free_port()
    with metrics.served(port):
        empty = Scrape(port)
        assert (empty.of("cost_usd"), empty.workspaces("Running")) == (None, 0)

        see(metrics, body("w", cost=COST), None)  # as the watch begins
        see(metrics, body("new", state="Running"), "ADDED")
        found = Scrape(port)
        assert [found.of(m) for m in ("cost_usd", "gpu_hours", "gpu_training_share")] == [1.25, 0.5, 0.75]
        assert found.of("cost_usd", "new") is None, "nothing was paid for it yet"
        assert (found.workspaces("Succeeded"), found.workspaces("Running"), found.workspaces("Failed")) == (1, 1, 0)

        see(metrics, body("w", state="Failed", cost={**COST, "usd": 2.5, "training_share": None}))
        changed = Scrape(port)
        assert (changed.of("cost_usd"), changed.of("gpu_training_share")) == (2.5, None)
        assert (changed.workspaces("Succeeded"), changed.workspaces("Failed")) == (0, 1)

        see(metrics, body("w"), "DELETED")
        gone = Scrape(port)
        assert (gone.of("cost_usd"), gone.of("gpu_hours"), gone.workspaces("Failed")) == (None, None, 0)
        assert gone.workspaces("Running") == 1
    with pytest.raises(httpx.ConnectError):
        Scrape(port)


def test_a_workspace_that_is_being_deleted_is_gone_even_if_its_end_is_never_heard() -> None:
    metrics, port = WorkspaceMetrics(), free_port()
    with metrics.served(port):
        old = body("w", "1", cost=COST)
        see(metrics, old)
        new = body("w", "2", cost={**COST, "usd": 9.0})
        see(metrics, new, "ADDED")
        assert Scrape(port).of("cost_usd") == 9.0, "the later of two that had the name"
        old["metadata"]["deletionTimestamp"] = "2026-11-25T00:00:00Z"
        see(metrics, old)
        assert Scrape(port).of("cost_usd") == 9.0
        see(metrics, old, "DELETED")
        new["metadata"]["deletionTimestamp"] = "2026-11-25T00:00:00Z"
        see(metrics, new)
        assert Scrape(port).of("cost_usd") is None


def test_one_that_nobody_has_looked_at_yet_is_pending() -> None:
    metrics, port = WorkspaceMetrics(), free_port()
    with metrics.served(port):
        see(metrics, {"metadata": {"name": "w", "namespace": "team", "uid": "1"}}, "ADDED")
        assert Scrape(port).workspaces("Pending") == 1


def test_port_0_serves_nowhere_and_one_that_is_taken_is_told() -> None:
    with WorkspaceMetrics().served(0):
        pass
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(PortTakenError, match=f"port {port}: .*KAITO_FLOWS_METRICS_PORT"),
            WorkspaceMetrics().served(port),
        ):
            pass


def eventually(what: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.2)
    return found


@pytest.mark.cluster
def test_the_watcher_hears_of_costs_and_of_deletions_without_asking(
    kubectl: Any, workspaces_crd: str, cluster: Cluster, tmp_path: Path
) -> None:
    port, nowhere = free_port(), free_port()
    environment = {
        **os.environ,
        "KAITO_FLOWS_METRICS_PORT": str(port),
        "PREFECT_API_URL": f"http://127.0.0.1:{nowhere}/api",  # it is away: that is no reason to be silent
    }
    command = [sys.executable, "-m", "kaito_flows.flows.watch_workspaces", kubectl.namespace]

    def scraped(metric: str) -> float | None:
        try:
            found = Scrape(port).series
        except httpx.TransportError:
            return None
        key = (f"kaito_flows_workspace_{metric}", ("namespace", kubectl.namespace), ("workspace", "w"))
        return found.get(key)  # type: ignore[arg-type]

    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "w"},
        "resource": {"labelSelector": {"matchLabels": {"app": "w"}}},
        "inference": {"template": {"spec": {"containers": [{"name": "main", "image": "none"}]}}},
    }
    kubectl("apply", "-f", "-", stdin=document)
    with (tmp_path / "log").open("wb") as log:
        watcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        eventually(lambda: kubectl.get("workspace", "w").get("status", {}).get("conditions"))
        assert scraped("cost_usd") is None
        cost = body(cost=COST)["status"]["cost"]
        cluster.within(kubectl.namespace).patch("Workspace", "w", {"status": {"cost": cost}}, "status")
        assert eventually(lambda: scraped("cost_usd")) == 1.25
        assert (scraped("gpu_hours"), scraped("gpu_training_share")) == (0.5, 0.75)
        kubectl("delete", "workspace", "w", "--timeout=60s")
        eventually(lambda: scraped("cost_usd") is None)
        assert Scrape(port).workspaces("Pending") == 0
    finally:
        watcher.terminate()
        watcher.wait(30)
    assert "forbidden" not in (tmp_path / "log").read_text().lower()
