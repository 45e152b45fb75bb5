"""The rights for Karpenter: the account of flow runs can rent and give back with them, and no other account can."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments.conftest import Installer
from provisioner import Provisioner, Refusal
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError
from kaito_flows.nodes import renting
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.karpenter import NodeClaims
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

pytestmark = pytest.mark.cluster

FLOW, WATCHER, WORKER = "kaito-flows-flow", "kaito-flows-watcher", "kaito-flows-worker"


@pytest.fixture
def account(allowed: Installer, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster for one who has the account of flow runs, and nothing else."""
    cluster = Cluster.connect(patience_seconds=60).within(allowed.namespace)

    def token() -> str:
        secrets = cluster.list("Secret", fields={"type": "kubernetes.io/service-account-token"})
        named = "kubernetes.io/service-account.name"
        own = [s["data"]["token"] for s in secrets if s["metadata"]["annotations"][named] == FLOW]
        return base64.b64decode(own[0]).decode() if own else ""

    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": eventually(token)}} for user in config["users"]]
    path = tmp_path / "flow.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    return Cluster.connect(patience_seconds=60).within(allowed.namespace)


def test_a_flow_run_rents_is_told_why_not_and_gives_back(
    account: Cluster, cluster: Cluster, node_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renting, "_NODE_SECONDS", 0.05)
    monkeypatch.setattr(NodeClaims, "look_seconds", 0.05)
    settings = Settings(owner=account.namespace, karpenter_node_class=node_class, capacity_seconds=0)
    rented = RentedNodes(NodeClaims(account, settings), account, settings)
    offers = (Offer("Standard_NC40ads_H100_v5", 1), Offer("Standard_NC24ads_A100_v4", 1))
    request = NodeRequest("w", gpus=1, namespace=account.namespace, run_id="run-1", offers=offers)
    told: list[str] = []
    with Provisioner(cluster.within(account.namespace)) as provisioner:
        provisioner.refusals = {offers[0].instance_type: Refusal("InsufficientCapacityError", "none left", True)}
        rented.check(request)
        lease = rented.lease(request, lambda what, facts: told.append(f"{what}: {facts.get('reason', '')}"))
        assert "moving on: InsufficientCapacityError: none left" in told, "its Events were read"
        rented.hand_over(request.holder, lease.nodes)
        rented.release(NodeRequest("w", namespace=account.namespace).holder)
        assert eventually(lambda: not provisioner.claims())


def test_without_them_it_is_said_which_right_is_missing(account: Cluster, cluster: Cluster, node_class: str) -> None:
    binding = f"kaito-flows-karpenter-{account.namespace}"
    found = cluster.get("ClusterRoleBinding", binding)
    assert found is not None
    cluster.delete("ClusterRoleBinding", binding)
    claims = NodeClaims(account, Settings(karpenter_node_class=node_class))

    def refused() -> AccessError | None:
        try:
            claims.pools()
        except AccessError as exc:
            return exc
        return None

    try:
        error = eventually(refused, seconds=10)
        assert error.message.endswith("may not list nodeclaims.karpenter.sh cluster-wide")
        assert error.hint == "a ClusterRole bound to it must allow 'list' on 'nodeclaims.karpenter.sh'"
    finally:
        kept = {key: found["metadata"][key] for key in ("name", "labels")}
        cluster.apply({**found, "metadata": kept})


def test_nobody_else_makes_or_removes_claims_and_nobody_nodes(allowed: Installer) -> None:
    def may(account: str, verb: str, resource: str) -> bool:
        user = f"system:serviceaccount:{allowed.namespace}:{account}"
        return allowed.run("auth", "can-i", verb, resource, "--as", user).returncode == 0

    claims = "nodeclaims.karpenter.sh"
    assert may(FLOW, "create", claims) and may(FLOW, "delete", claims)
    assert not any(may(FLOW, verb, claims) for verb in ("deletecollection", "update"))
    assert not any(may(FLOW, verb, "nodes") for verb in ("create", "patch", "delete"))
    assert not any(may(who, verb, claims) for who, verb in itertools.product((WATCHER, WORKER), ("create", "delete")))
