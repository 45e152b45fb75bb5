"""Who makes the nodes of a cluster's claims: the node class that they refer to, and what that provider can do."""

from __future__ import annotations

from dataclasses import dataclass

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.resources import resource
from kaito_flows.errors import InputError

_NODE_CLASSES = ("AKSNodeClass", "EC2NodeClass", "KaitoNodeClass")
_USUAL = "default"
_REGION = "topology.kubernetes.io/region"


@dataclass(frozen=True, slots=True)
class NodeClass:
    """The provider's own settings for nodes, by which Karpenter finds the provider.

    `KaitoNodeClass` is that of gpu-provisioner, which asks for no object of it: the name is enough.
    """

    kind: str
    name: str

    @property
    def group(self) -> str:
        """The API group of the kind."""
        return resource(self.kind).group

    @property
    def is_gpu_provisioner(self) -> bool:
        """Whether claims go to Azure's gpu-provisioner: an agent pool each, on demand, in a zone that Azure chooses."""
        return self.kind == "KaitoNodeClass"

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


def find_node_class(cluster: Cluster, wanted: str) -> NodeClass:
    """Return the node class that the settings name (`KIND/NAME`), else the one that is there, else `default`.

    Raises:
        InputError: `invalid-node-class`: that is not `KIND/NAME`; `node-class-missing`: there is none, or not that
            one; `node-class-ambiguous`: there are several, and none is called `default`.
    """
    if wanted:
        return _named(cluster, wanted)
    found = [
        NodeClass(kind, item["metadata"]["name"])
        for kind in _NODE_CLASSES
        if kind != "KaitoNodeClass" and (versions := cluster.served(kind))
        for item in cluster.list(f"{versions[0]}/{kind}")
    ]
    usual = [node_class for node_class in found if node_class.name == _USUAL]
    if len(usual or found) == 1:
        return (usual or found)[0]
    if found:
        raise InputError(
            f"there are several node classes: {', '.join(map(str, found))}",
            place="KAITO_FLOWS_KARPENTER_NODE_CLASS",
            hint="name the one whose nodes are for GPUs, as KIND/NAME",
            code="node-class-ambiguous",
        )
    if cluster.served("KaitoNodeClass"):
        return NodeClass("KaitoNodeClass", _USUAL)
    raise InputError(
        "Karpenter is installed, and there is no node class",
        place="KAITO_FLOWS_KARPENTER_NODE_CLASS",
        hint=f"create an {_NODE_CLASSES[0]} or an {_NODE_CLASSES[1]}; docs/karpenter.md has an example",
        code="node-class-missing",
    )


def _named(cluster: Cluster, wanted: str) -> NodeClass:
    kind, _, name = wanted.partition("/")
    if kind not in _NODE_CLASSES or not name:
        raise InputError(
            f"{wanted!r} is not KIND/NAME",
            place="KAITO_FLOWS_KARPENTER_NODE_CLASS",
            hint=f"KIND is one of {', '.join(_NODE_CLASSES)}",
            code="invalid-node-class",
        )
    found = NodeClass(kind, name)
    versions = cluster.served(kind)
    if not found.is_gpu_provisioner and (not versions or cluster.get(f"{versions[0]}/{kind}", name) is None):
        raise InputError(
            f"there is no {found}",
            place="KAITO_FLOWS_KARPENTER_NODE_CLASS",
            hint=f"kubectl get {resource(kind).plural} shows those that are there",
            code="node-class-missing",
        )
    return found


def zone_label(cluster: Cluster, node_class: NodeClass, zone: str) -> str:
    """Return a zone as nodes are labelled with it: Azure's zone `1` is `westeurope-1` there."""
    if not zone.isdigit() or node_class.kind != "AKSNodeClass":
        return zone
    regions = {node["metadata"].get("labels", {}).get(_REGION, "") for node in cluster.list("Node")} - {""}
    return f"{min(regions)}-{zone}" if regions else zone
