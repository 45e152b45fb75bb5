"""Readiness: a node can take a job, or it is said what it still waits for."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.nodes.readiness import is_ready, name_of, waits_for

SIZE = "Standard_NC24ads_A100_v4"
HOST = {"kubernetes.io/hostname": "host-a"}
READY = {"type": "Ready", "status": "True"}


def node(
    capacity: int | None = 1, allocatable: int | None = None, *, labels: dict[str, str] | None = None, **ready: str
) -> dict[str, Any]:
    """A node; without `capacity` there is no device plugin."""
    offered = capacity if allocatable is None else allocatable
    return {
        "metadata": {"name": "a", "labels": {**HOST, "node.kubernetes.io/instance-type": SIZE} | (labels or {})},
        "status": {
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {**READY, **ready}],
            "capacity": {} if capacity is None else {"nvidia.com/gpu": str(capacity)},
            "allocatable": {} if offered is None else {"nvidia.com/gpu": str(offered)},
        },
    }


def test_a_node_with_all_that_is_asked_for_waits_for_nothing() -> None:
    assert waits_for([node()], 1, SIZE, 1) == ""
    assert waits_for([node(4), node(2)], 2, SIZE, 2) == ""


def test_more_gpus_than_asked_for_are_no_reason_to_wait_and_none_need_no_device_plugin() -> None:
    assert waits_for([node(8)], 1, SIZE, 4) == ""
    assert waits_for([node(None)], 1, SIZE, 0) == ""


@pytest.mark.parametrize(
    ("nodes", "count", "reason"),
    [
        ([], 1, "no node has joined the cluster"),
        ([node()], 2, "1 of 2 nodes have joined the cluster"),
        ([node(status="False", message="container runtime network not ready")], 1,
         "a: not Ready: container runtime network not ready"),
        ([node(status="Unknown", reason="NodeStatusUnknown")], 1, "a: not Ready: NodeStatusUnknown"),
        ([node(status="False")], 1, "a: not Ready"),
        ([node(labels={"node.kubernetes.io/instance-type": "Standard_D4s_v5"})], 1,
         f"a is a Standard_D4s_v5, not a {SIZE}"),
        ([node(None)], 1,
         "a: no device plugin has registered nvidia.com/gpu: the driver is being installed, or the plugin is missing"),
        ([node(0)], 1, "a: the device plugin offers 0 nvidia.com/gpu, not 2: is the driver up?"),
        ([node(1)], 1, "a: the device plugin offers 1 nvidia.com/gpu, not 2: is the driver up?"),
        ([node(2, allocatable=1)], 1, "a: 1 of 2 nvidia.com/gpu are not healthy, the device plugin says"),
        ([node(2), node(None)], 2,
         "a: no device plugin has registered nvidia.com/gpu: the driver is being installed, or the plugin is missing"),
    ],
)  # fmt: skip
def test_what_a_node_waits_for_is_said(nodes: list[dict[str, Any]], count: int, reason: str) -> None:
    assert waits_for(nodes, count, SIZE, 2) == reason


def test_a_node_of_which_the_kubelet_has_said_nothing_waits_for_the_kubelet() -> None:
    silent = node()
    del silent["status"]["conditions"]
    assert waits_for([silent], 1, SIZE, 1) == "a: the kubelet has not said anything yet"
    assert not is_ready(silent)
    assert not is_ready({"metadata": {"name": "a"}})


def test_a_node_without_a_host_name_cannot_be_pinned_to() -> None:
    nameless = node()
    del nameless["metadata"]["labels"]["kubernetes.io/hostname"]
    assert waits_for([nameless], 1, SIZE, 1) == "a has no label kubernetes.io/hostname"


def test_the_size_is_compared_without_case_and_one_that_is_not_told_may_be_right() -> None:
    assert waits_for([node(labels={"node.kubernetes.io/instance-type": SIZE.lower()})], 1, SIZE, 1) == ""
    assert waits_for([node(labels={"node.kubernetes.io/instance-type": ""})], 1, SIZE, 1) == ""
    assert waits_for([node(labels={"node.kubernetes.io/instance-type": "any"})], 1, "", 1) == ""


def test_pods_are_pinned_by_the_host_name_which_need_not_be_the_nodes_name() -> None:
    assert name_of(node()) == "host-a"
    assert name_of({"metadata": {"name": "a"}}) == "a"
