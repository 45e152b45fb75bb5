"""Nodes for tests that nobody runs: pods can be sent there, and the node can vanish."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kaito_flows.cluster.gateway import Cluster

MARK = "kaito-flows-test"
"""The key of a fake node's label, whose value is the node's name, and of the taint that keeps pods from it."""


@contextmanager
def fake_node(cluster: Cluster, name: str, *, taint: bool) -> Iterator[str]:
    """A node that nobody runs: it says that it is Ready, and keeps saying so while the block lasts."""

    def status() -> dict[str, Any]:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "", "lastHeartbeatTime": now}
        room = {"cpu": "4", "memory": "8Gi", "pods": "20", "nvidia.com/gpu": "4"}
        addresses = [{"type": "Hostname", "address": name}]
        conditions = [{**ready, "lastTransitionTime": now}]
        return {"conditions": conditions, "addresses": addresses, "allocatable": room, "capacity": room}

    taints = [{"key": MARK, "value": "kept", "effect": "NoSchedule"}] if taint else []
    labels = {"kubernetes.io/hostname": name, MARK: name}
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels},
            "spec": {"taints": taints},
            "status": status(),
        }
    )
    over = threading.Event()

    def beat() -> None:
        while not over.wait(8) and cluster.patch("Node", name, {"status": status()}, "status"):
            pass

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield name
    finally:
        over.set()
        cluster.delete("Node", name)
        heart.join()
