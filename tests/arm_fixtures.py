"""Azure's stand-in as a fixture, with two sizes of GPU nodes and quota for them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from arm import Azure

    from kaito_flows.cluster.gateway import Cluster

A100, T4 = "Standard_NC24ads_A100_v4", "Standard_NC4as_T4_v3"
A100_FAMILY, T4_FAMILY = "StandardNCADSA100v4Family", "Standard NCASv3_T4 Family"


ROLES = Path(__file__).parents[1] / "deployments" / "azure"


def actions() -> set[str]:
    """What the roles of docs/aks.md allow."""
    return {action for role in ROLES.glob("*-role.json") for action in json.loads(role.read_text())["Actions"]}


@pytest.fixture
def azure(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azure]:
    """Azure as a pod sees it: the environment of the test leads to it, and our roles say what it may do."""
    from arm import Azure  # its wire types take half a second

    standin = Azure(tmp_path_factory.mktemp("azure"))
    standin.offer(A100, A100_FAMILY, cores=24, limit=48)
    standin.offer(T4, T4_FAMILY, cores=4, limit=16)
    standin.allowed = actions()
    standin.start()
    for name, value in standin.environment().items():
        monkeypatch.setenv(name, value)
    yield standin
    standin.stop()


@pytest.fixture
def at_azure(azure: Azure, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Azure:
    """Azure, from which the settings rent, beside a cluster that is reached without its proxy."""
    host = cluster.connection.server.partition("//")[2].partition(":")[0]
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, f"{os.environ['no_proxy']},{host}")
    monkeypatch.setenv("KAITO_FLOWS_PLATFORM", "kubernetes")
    monkeypatch.setenv("KAITO_FLOWS_NODES", "aks")
    azure.boot_seconds, azure.delete_seconds = 1.0, 0.3
    return azure


class PoolNodes:
    """The nodes of the pools that are up, as a Kubernetes would list them: each with `gpus`, and ready."""

    def __init__(self, azure: Azure, gpus: int = 1) -> None:
        self.azure, self.gpus = azure, gpus
        self.absent: set[str] = set()
        """VM sizes of which no node comes up."""

    def within(self, namespace: str) -> PoolNodes:
        return self

    def list(self, kind: str, *, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        if kind != "Node":
            return []
        self.azure.settle()
        with self.azure.lock:
            pools = [pool.body for pool in self.azure.pools.values()]
        nodes = [node for pool in pools if self._is_up(pool["properties"]) for node in self._nodes_of(pool)]
        return [node for node in nodes if (labels or {}).items() <= node["metadata"]["labels"].items()]

    def _is_up(self, properties: dict[str, Any]) -> bool:
        return properties["provisioningState"] in ("Succeeded", "Updating") and properties["vmSize"] not in self.absent

    def _nodes_of(self, pool: dict[str, Any]) -> Iterator[dict[str, Any]]:
        properties, room = pool["properties"], {"nvidia.com/gpu": str(self.gpus)}
        for i in range(properties["count"]):
            name = f"aks-{pool['name']}-vmss{i:06}"
            known = {"kubernetes.io/hostname": name, "node.kubernetes.io/instance-type": properties["vmSize"]}
            yield {
                "metadata": {"name": name, "labels": {**properties.get("nodeLabels", {}), **known}},
                "spec": {},
                "status": {
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "allocatable": room,
                    "capacity": room,
                },
            }


class SteadyClock:
    """Time that passes only when somebody waits: for the code under test, and for Azure's stand-in."""

    def __init__(self, azure: Azure) -> None:
        self.azure = azure
        self._start = time.time()
        self.passed = 0.0
        azure.wall = self.wall

    def wall(self) -> float:
        return self._start + self.passed

    def monotonic(self) -> float:
        return self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += seconds
        self.azure.settle()

    def wait(self, seconds: float) -> bool:
        """As an event that nobody sets."""
        self.sleep(seconds)
        return False

    def is_set(self) -> bool:
        return False


@pytest.fixture
def steady(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> SteadyClock:
    """A clock that waiting moves on, in the place of the real one."""
    clock = SteadyClock(azure)
    for module in ("aks", "azure.arm", "renting"):
        monkeypatch.setattr(f"kaito_flows.nodes.{module}.time", clock)
    monkeypatch.setattr(
        "azure.core.pipeline.transport.RequestsTransport.sleep", lambda _, seconds: clock.sleep(seconds)
    )
    return clock
