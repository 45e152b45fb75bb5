"""When a node can take a job, and what it still waits for: its own word, its size, its GPUs, its device plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

Node = Mapping[str, Any]

GPU = "nvidia.com/gpu"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"
HOSTNAME = "kubernetes.io/hostname"


def name_of(node: Node) -> str:
    """The label by which pods are pinned to the node: its host name, nearly always its name."""
    labels = node["metadata"].get("labels", {})
    return str(labels.get(HOSTNAME, node["metadata"]["name"]))


def is_ready(node: Node) -> bool:
    """Whether the kubelet says that it is."""
    conditions = node.get("status", {}).get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def waits_for(nodes: Sequence[Node], count: int, instance_type: str, gpus: int) -> str:
    """What the nodes of a pool still wait for, in words; empty when all can take a job."""
    if len(nodes) < count:
        return f"{len(nodes)} of {count} nodes have joined the cluster" if nodes else "no node has joined the cluster"
    return next((wait for node in nodes if (wait := _waits(node, instance_type, gpus))), "")


def ready_since(nodes: Sequence[Node]) -> datetime | None:
    """When the last of the nodes became Ready, by the cluster's clock; None where that is not said."""
    conditions = [c for node in nodes for c in node.get("status", {}).get("conditions", ()) if c["type"] == "Ready"]
    said = [c["lastTransitionTime"] for c in conditions if c.get("lastTransitionTime")]
    return max(map(datetime.fromisoformat, said)) if nodes and len(said) == len(nodes) else None


def _waits(node: Node, instance_type: str, gpus: int) -> str:
    name, labels = node["metadata"]["name"], node["metadata"].get("labels", {})
    size = labels.get(INSTANCE_TYPE, "")
    if not is_ready(node):
        return f"{name}: {_not_ready(node)}"
    if instance_type and size.lower() not in ("", instance_type.lower()):
        return f"{name} is a {size}, not a {instance_type}"
    if HOSTNAME not in labels:
        return f"{name} has no label {HOSTNAME}"
    status = node.get("status", {})
    offered, there = int(status.get("allocatable", {}).get(GPU, "0")), int(status.get("capacity", {}).get(GPU, "0"))
    if offered >= gpus:
        return ""
    if GPU not in status.get("capacity", {}):
        return f"{name}: no device plugin has registered {GPU}: the driver is being installed, or the plugin is missing"
    if there >= gpus:
        return f"{name}: {there - offered} of {there} {GPU} are not healthy, the device plugin says"
    return f"{name}: the device plugin offers {there} {GPU}, not {gpus}: is the driver up?"


def _not_ready(node: Node) -> str:
    conditions = node.get("status", {}).get("conditions", ())
    found = next((c for c in conditions if c["type"] == "Ready"), None)
    if found is None:
        return "the kubelet has not said anything yet"
    said = found.get("message") or found.get("reason") or ""
    return f"not Ready: {said}" if said else "not Ready"
