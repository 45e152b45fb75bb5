"""Own nodes: those of the cluster that carry the Workspace's labels. They are chosen, never made and never removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import SchedulingError
from kaito_flows.nodes.base import Holder, NodeLease, NodeRequest, Tell
from kaito_flows.nodes.pools import POOL_LABEL
from kaito_flows.nodes.readiness import GPU, INSTANCE_TYPE, is_ready, name_of


class ExistingNodes:
    """The provider of nodes that are there: ready, with the labels, the size and the GPUs that a request names."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def check(self, request: NodeRequest) -> Mapping[str, str]:
        """Nothing is rented, so nothing speaks against it."""
        return {}

    def lease(self, request: NodeRequest, tell: Tell, stop: Event | None = None) -> NodeLease:
        """Return the names of every node that could take the job, preferred ones first.

        Raises:
            SchedulingError: (code `no-node`) none could, with what speaks against each.
        """
        nodes = self._cluster.list("Node", labels=selector(request))
        against = {name_of(node): _against(node, request) for node in nodes}
        fitting = [name for name, reason in against.items() if not reason]
        if not fitting:
            raise SchedulingError(_told(request, against), place="resource", hint=_hint(request), code="no-node")
        fitting.sort(key=lambda name: (name not in request.preferred, name))
        chosen = next(node for node in nodes if name_of(node) == fitting[0])
        size = request.instance_type or chosen["metadata"].get("labels", {}).get(INSTANCE_TYPE, "")
        return NodeLease("existing", request.workspace, tuple(fitting), size, 0.0, gpus=request.gpus)

    def alive(self, lease: NodeLease) -> bool:
        """Whether one of the nodes is still there and ready."""
        ready = {name_of(node) for node in self._cluster.list("Node") if is_ready(node)}
        return not ready.isdisjoint(lease.nodes)

    def renew(self, lease: NodeLease, *, followed: bool = False) -> NodeLease:
        """Own nodes stay."""
        return lease

    def release(self, holder: Holder, *, keep: bool = False) -> None:
        """Own nodes stay."""

    def hand_over(self, holder: Holder, nodes: Sequence[str]) -> None:
        """Own nodes stay."""


def selector(request: NodeRequest) -> str:
    """The request's labels as Kubernetes' list calls take them."""
    equal = [f"{key}={value}" for key, value in sorted(request.labels.items())]
    among = [f"{key} in ({','.join(values)})" for key, values in sorted(request.any_of.items())]
    return ",".join([*equal, *among])


def _against(node: Mapping[str, Any], request: NodeRequest) -> str:
    """What keeps a node from taking the job, "" if nothing does."""
    size = node["metadata"].get("labels", {}).get(INSTANCE_TYPE, "")
    gpus = int(node.get("status", {}).get("allocatable", {}).get(GPU, "0"))
    if POOL_LABEL in node["metadata"].get("labels", {}):
        return "is rented for another purpose"
    if not is_ready(node):
        return "is not Ready"
    if node.get("spec", {}).get("unschedulable"):
        return "is cordoned"
    # A node that does not say its size may have it: on own hardware nobody sets the label.
    if request.instance_type and size and size.lower() != request.instance_type.lower():
        return f"is a {size}"
    if gpus < request.gpus:
        return f"offers {gpus} {GPU}, not {request.gpus}"
    return ""


def _told(request: NodeRequest, against: Mapping[str, str]) -> str:
    if not against:
        return f"no node has the labels {selector(request) or '(none asked for)'}"
    some = [f"{name} {reason}" for name, reason in sorted(against.items())][:5]
    more = f", and {len(against) - 5} more do not fit" if len(against) > 5 else ""
    return f"no node can take it: {'; '.join(some)}{more}"


def _hint(request: NodeRequest) -> str:
    if request.gpus:
        return "label a GPU node (kubectl label node NAME KEY=VALUE); without GPUs: is NVIDIA's device plugin running?"
    return "label a node: kubectl label node NAME KEY=VALUE"
