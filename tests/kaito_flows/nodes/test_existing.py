"""Own nodes: those that could take a job are named, preferred ones first; of the others it is said what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.errors import SchedulingError
from kaito_flows.nodes import NodeLease, NodeRequest
from kaito_flows.nodes.existing import ExistingNodes
from kaito_flows.workspace import WorkspaceV1beta1


def node(name: str, *, gpus: int = 1, ready: str = "True", size: str = "", **spec: Any) -> dict[str, Any]:
    labels = {"kubernetes.io/hostname": name, **({"node.kubernetes.io/instance-type": size} if size else {})}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
        "status": {
            "allocatable": {"nvidia.com/gpu": str(gpus)},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


class Nodes:
    """What the API server would list; remembers what it was asked for."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.nodes, self.asked = list(nodes), ""

    def list(self, kind: str, *, labels: str = "") -> list[dict[str, Any]]:
        assert kind == "Node"
        self.asked = labels
        return self.nodes


def lease(*nodes: dict[str, Any], **request: Any) -> NodeLease:
    return ExistingNodes(Nodes(*nodes)).lease(NodeRequest("w", **{"gpus": 1, **request}), lambda *_: None)  # type: ignore[arg-type]


def test_every_node_that_fits_is_named_and_preferred_ones_come_first() -> None:
    found = lease(node("a"), node("b", gpus=0), node("c"), preferred=("c",))
    assert found.nodes == ("c", "a")
    assert found.provider == "existing"


def test_nodes_are_asked_for_by_the_labels_that_the_workspace_names() -> None:
    raw = {
        "metadata": {"name": "w", "annotations": {"kaito-flows/gpus": "0"}},
        "resource": {
            "labelSelector": {
                "matchLabels": {"app": "w", "a": "b"},
                "matchExpressions": [{"key": "zone", "operator": "In", "values": ["1", "2"]}],
            }
        },
        "inference": {"template": {"spec": {}}},
    }
    request = NodeRequest.of(WorkspaceV1beta1.model_validate(raw), gpus=4)
    assert request.gpus == 0, "the annotation asks for CPUs"
    listed = Nodes(node("a", gpus=0))
    ExistingNodes(listed).lease(request, lambda *_: None)  # type: ignore[arg-type]
    assert listed.asked == "a=b,app=w,zone in (1,2)"


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (node("n", ready="False"), "n is not Ready"),
        (node("n", unschedulable=True), "n is cordoned"),
        (node("n", size="Standard_D4s_v5"), "n is a Standard_D4s_v5"),
        (node("n", gpus=0), "n offers 0 nvidia.com/gpu, not 1"),
    ],
)
def test_what_speaks_against_a_node_is_said(unfit: dict[str, Any], reason: str) -> None:
    with pytest.raises(SchedulingError, match=f"no-node: resource: no node can take it: {reason}"):
        lease(unfit, instance_type="Standard_NC24ads_A100_v4")


def test_a_node_that_does_not_say_its_size_may_have_it() -> None:
    assert lease(node("n"), instance_type="Standard_NC24ads_A100_v4").instance_type == "Standard_NC24ads_A100_v4"
    assert lease(node("n", size="Standard_NC24ads_A100_v4")).instance_type == "Standard_NC24ads_A100_v4"


def test_that_no_node_has_the_labels_is_said_with_the_labels() -> None:
    with pytest.raises(SchedulingError, match="no node has the labels app=w"):
        lease(labels={"app": "w"})


def test_a_lease_lives_as_long_as_one_of_its_nodes() -> None:
    held = NodeLease("existing", "w", ("a", "b"), "", 0.0)
    assert ExistingNodes(Nodes(node("a", ready="Unknown"), node("b"))).alive(held)  # type: ignore[arg-type]
    assert not ExistingNodes(Nodes(node("a", ready="Unknown"), node("c"))).alive(held)  # type: ignore[arg-type]


def test_a_node_that_is_rented_for_somebody_is_nobody_else_s() -> None:
    rented = node("rented")
    rented["metadata"]["labels"]["kaito-flows/pool"] = "kf0123456789"
    assert lease(rented, node("own")).nodes == ("own",)
    with pytest.raises(SchedulingError, match="rented is rented for another purpose"):
        lease(rented)
