"""What the cluster says of pools that no run answers for: does the service still run there, is the Workspace there?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.labels import selector
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import AccessError, KaitoFlowsError
from kaito_flows.nodes.pools import Cloud, Pool
from kaito_flows.nodes.readiness import name_of
from kaito_flows.nodes.reaping import Use
from kaito_flows.platforms.pods import placed


def uses_of(pools: Iterable[Pool], cloud: Cloud, cluster: Cluster) -> dict[str, Use]:
    """Return where the services of the serving pools run: on the pool, elsewhere, nowhere; by the pool's name.

    What cannot be told for want of an answer, or of a right, is `unknown`. A leased pool is told of when its run has
    brought the service up there, and could not say so.
    """
    pools = list(pools)
    uses = {pool.name: _use(pool, cloud, cluster) for pool in pools if pool.record.state == "serving"}
    leased = [pool.name for pool in pools if pool.record.state == "leased" and is_served_by(pool, cloud, cluster)]
    return {**uses, **dict.fromkeys(leased, "here")}


def is_served_by(pool: Pool, cloud: Cloud, cluster: Cluster) -> bool:
    """Whether the Workspace's service is seen on the pool's nodes. What cannot be told is no."""
    if not pool.record.holder.namespace:
        return False
    try:
        services, pods, nodes = _seen(pool, cloud, cluster)
    except KaitoFlowsError:
        return False
    return not nodes.isdisjoint(_places(services, pods))


def forgotten(pools: Iterable[Pool], cluster: Cluster) -> frozenset[str]:
    """Return the names of the kept pools whose Workspace is no longer there, as far as it can be told."""
    kept = [pool for pool in pools if pool.record.state == "kept"]
    return frozenset(pool.name for pool in kept if _is_forgotten(pool, cluster))


def _use(pool: Pool, cloud: Cloud, cluster: Cluster) -> Use:
    namespace = pool.record.holder.namespace
    if not namespace:
        return "unknown"
    try:
        services, pods, nodes = _seen(pool, cloud, cluster)
    except KaitoFlowsError as exc:
        return "gone" if _namespace_is_gone(exc, namespace, cluster) else "unknown"
    if not services:
        return "gone"
    if not nodes.isdisjoint(_places(services, pods)):
        return "here"
    # A pod that has no node yet may come here, and nodes that are not seen may come back.
    settled = all(map(placed, services)) or (all(map(_node_of, pods)) and bool(pods))
    return "elsewhere" if nodes and settled else "here"


def _seen(pool: Pool, cloud: Cloud, cluster: Cluster) -> tuple[list[Object], list[Object], set[str]]:
    """The Workspace's Deployments that serve, their pods, and the names of the pool's nodes."""
    holder = pool.record.holder
    there, wanted = cluster.within(holder.namespace), selector(holder.workspace, "server")
    services = there.list("Deployment", labels=wanted)
    if not services:
        return [], [], set()
    nodes = cluster.list("Node", labels=cloud.node_labels(pool.name))
    names = {name for node in nodes for name in (node["metadata"]["name"], name_of(node))}
    return services, there.list("Pod", labels=wanted), names


def _places(services: Sequence[Object], pods: Sequence[Object]) -> set[str]:
    """The nodes that services are pinned to, and that their pods are on."""
    return {*(name for one in services for name in placed(one)), *map(_node_of, pods)}


def _node_of(pod: Object) -> str:
    return str(pod["spec"].get("nodeName", ""))


def _is_forgotten(pool: Pool, cluster: Cluster) -> bool:
    holder = pool.record.holder
    if not holder.namespace:
        return False
    try:
        return cluster.within(holder.namespace).get("Workspace", holder.workspace) is None
    except KaitoFlowsError as exc:
        return _namespace_is_gone(exc, holder.namespace, cluster)


def _namespace_is_gone(exc: KaitoFlowsError, namespace: str, cluster: Cluster) -> bool:
    """Whether a right is missing because the namespace is, and with it what gave the right."""
    if not isinstance(exc, AccessError):
        return False
    try:
        return cluster.get("Namespace", namespace) is None
    except KaitoFlowsError:
        return False
