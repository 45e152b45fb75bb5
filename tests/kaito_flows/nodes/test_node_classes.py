"""Node classes: the one that is named, else the one that is there, else an answer to what is missing."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import InputError
from kaito_flows.nodes.node_classes import NodeClass, find_node_class, zone_label

V = {
    "AKSNodeClass": "karpenter.azure.com/v1beta1",
    "EC2NodeClass": "karpenter.k8s.aws/v1",
    "KaitoNodeClass": "kaito.sh/v1alpha1",
}


class Api:
    """What an API server with these node classes answers; a kind that is not among them is not served."""

    def __init__(self, regions: tuple[str, ...] = (), **names: tuple[str, ...]) -> None:
        self.names, self.regions = names, regions

    def served(self, kind: str) -> list[str]:
        return [V[kind]] if kind in self.names else []

    def list(self, kind: str) -> list[dict[str, Any]]:
        if kind == "Node":
            key = "topology.kubernetes.io/region"
            return [{"metadata": {"labels": {key: region}}} for region in self.regions] + [{"metadata": {}}]
        version, _, short = kind.rpartition("/")
        assert version == V[short]
        return [{"metadata": {"name": name}} for name in self.names[short]]

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        return next((item for item in self.list(kind) if item["metadata"]["name"] == name), None)


def found(wanted: str = "", **names: tuple[str, ...]) -> str:
    return str(find_node_class(cast(Cluster, Api(**names)), wanted))


def test_the_only_one_is_taken_and_of_several_the_one_called_default() -> None:
    assert found(AKSNodeClass=("gpu",)) == "AKSNodeClass/gpu"
    assert found(EC2NodeClass=("default",)) == "EC2NodeClass/default"
    assert found(AKSNodeClass=("system-surge", "default")) == "AKSNodeClass/default"


def test_gpu_provisioner_has_a_kind_and_needs_no_object_of_it() -> None:
    assert found(KaitoNodeClass=()) == "KaitoNodeClass/default"
    assert found(AKSNodeClass=("default",), KaitoNodeClass=()) == "AKSNodeClass/default"
    assert found("KaitoNodeClass/default", AKSNodeClass=("default",), KaitoNodeClass=()) == "KaitoNodeClass/default"
    assert NodeClass("KaitoNodeClass", "default").is_gpu_provisioner
    assert NodeClass("KaitoNodeClass", "default").group == "kaito.sh"


@pytest.mark.parametrize(
    ("wanted", "names", "error"),
    [
        ("", {}, "node-class-missing: .*Karpenter is installed, and there is no node class"),
        ("", {"AKSNodeClass": ()}, "node-class-missing"),
        ("", {"AKSNodeClass": ("a", "b")}, "node-class-ambiguous: .*AKSNodeClass/a, AKSNodeClass/b"),
        ("", {"AKSNodeClass": ("default",), "EC2NodeClass": ("default",)}, "node-class-ambiguous"),
        ("AKSNodeClass/gpu", {"AKSNodeClass": ("default",)}, "node-class-missing: .*there is no AKSNodeClass/gpu"),
        ("EC2NodeClass/gpu", {"AKSNodeClass": ("default",)}, "node-class-missing"),
        ("default", {"AKSNodeClass": ("default",)}, "invalid-node-class: .*'default' is not KIND/NAME"),
        ("GCENodeClass/default", {}, "invalid-node-class"),
    ],
)
def test_what_is_missing_is_said(wanted: str, names: dict[str, tuple[str, ...]], error: str) -> None:
    with pytest.raises(InputError, match=error):
        found(wanted, **names)


def test_azures_zones_have_the_region_before_their_number_on_nodes() -> None:
    aks = NodeClass("AKSNodeClass", "default")
    here = cast(Cluster, Api(regions=("westeurope",)))
    assert zone_label(here, aks, "1") == "westeurope-1"
    assert zone_label(here, aks, "westeurope-2") == "westeurope-2"
    assert zone_label(here, aks, "") == ""
    assert zone_label(here, NodeClass("EC2NodeClass", "default"), "us-east-1a") == "us-east-1a"
    assert zone_label(cast(Cluster, Api()), aks, "1") == "1", "no node says where it is"
