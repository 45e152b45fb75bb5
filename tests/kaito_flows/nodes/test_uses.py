"""Whether a service still runs on a pool, as the cluster's objects say, and what is said when they cannot be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from fake_cloud import FakeCloud, FakeCluster, pod_object, service_object, workspace_object

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError, ClusterError
from kaito_flows.nodes.uses import forgotten, uses_of

TEAM = {"kind": "Namespace", "metadata": {"name": "team"}}


def use(cloud: FakeCloud, cluster: FakeCluster) -> str:
    [found] = uses_of(cloud.there.values(), cloud, cast(Cluster, cluster)).values()
    return found


@pytest.fixture
def cloud() -> FakeCloud:
    cloud = FakeCloud()
    cloud.add("pool", "r", state="serving")
    return cloud


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ([], "gone"),
        ([service_object(workspace="another")], "gone"),
        ([service_object(namespace="another")], "gone"),
        ([service_object(["pool-0"])], "here"),
        ([service_object(["own-node"])], "elsewhere"),
        ([service_object(["own-node"]), service_object(["pool-0"])], "here"),
        ([service_object(), pod_object("pool-0")], "here"),
        ([service_object(), pod_object("own-node")], "elsewhere"),
        ([service_object(), pod_object("own-node"), pod_object("")], "here"),
        ([service_object()], "here"),
    ],
)
def test_where_a_service_is(cloud: FakeCloud, objects: list[dict[str, Any]], found: str) -> None:
    assert use(cloud, FakeCluster(cloud, objects=objects)) == found


def test_a_pool_whose_nodes_are_not_seen_is_in_use_while_there_is_a_service(cloud: FakeCloud) -> None:
    cloud.fail("pool", "evicted")
    assert use(cloud, FakeCluster(cloud, objects=[service_object(["pool-0"])])) == "here"
    assert use(cloud, FakeCluster(cloud)) == "gone"


def test_what_cannot_be_asked_is_unknown(cloud: FakeCloud) -> None:
    cluster = FakeCluster(cloud, objects=[TEAM])
    for fault in (ClusterError("away"), AccessError("may not list deployments")):
        cluster.faults = {("team", "Deployment"): fault}
        assert use(cloud, cluster) == "unknown"
    cloud.add("pool", "r", state="serving", namespace="")
    assert use(cloud, FakeCluster(cloud)) == "unknown"


def test_a_namespace_that_is_gone_with_its_rights_is_told_from_one_that_may_not_be_seen(cloud: FakeCloud) -> None:
    cluster = FakeCluster(cloud)
    cluster.faults = {("team", "Deployment"): AccessError("may not list deployments")}
    assert use(cloud, cluster) == "gone"
    cluster.faults["kaito-flows", "Namespace"] = AccessError("may not get namespaces")
    assert use(cloud, cluster) == "unknown"


def test_a_kept_pool_is_forgotten_when_its_workspace_is_gone(cloud: FakeCloud) -> None:
    cloud.add("kept", "r", state="kept", workspace="w")
    cloud.add("left", "r", state="kept", workspace="gone")
    cloud.add("leased", "r", workspace="gone")
    cluster = FakeCluster(cloud, objects=[workspace_object("w"), TEAM])
    assert forgotten(cloud.there.values(), cast(Cluster, cluster)) == {"left"}
    cluster.faults = {("team", "Workspace"): AccessError("may not get workspaces")}
    assert forgotten(cloud.there.values(), cast(Cluster, cluster)) == frozenset()


@pytest.mark.cluster
def test_a_real_cluster_says_the_same(space: Cluster) -> None:
    [node, *_] = space.list("Node")
    host = node["metadata"]["labels"]["kubernetes.io/hostname"]

    class OnThatNode(FakeCloud):
        def node_labels(self, name: str) -> Mapping[str, str]:
            return {"kubernetes.io/hostname": host}

    cloud = OnThatNode()
    cloud.add("pool", "r", state="serving", namespace=space.namespace)
    cloud.add("kept", "r", state="kept", namespace=space.namespace)
    cloud.add("moved-away", "r", state="serving", namespace="kaito-flows-no-such-namespace")
    assert uses_of(cloud.there.values(), cloud, space) == {"pool": "gone", "moved-away": "gone"}
    assert forgotten(cloud.there.values(), space) == {"kept"}

    def service(pinned: Sequence[str]) -> dict[str, Any]:
        made = service_object(pinned, namespace=space.namespace)
        own = made["metadata"]["labels"]
        container = {"name": "main", "image": "kaito-flows-no-such-image"}
        template = {
            "metadata": {"labels": own},
            "spec": {**made["spec"]["template"]["spec"], "containers": [container]},
        }
        spec = {"replicas": 0, "selector": {"matchLabels": own}, "template": template}
        return {"apiVersion": "apps/v1", **made, "spec": spec}

    for pinned, found in (([host], "here"), (["another-node"], "elsewhere")):
        space.apply(service(pinned))
        assert uses_of(cloud.there.values(), cloud, space)["pool"] == found
        space.delete("Deployment", "w-1")
        space.wait_gone("Deployment", "w-1")
