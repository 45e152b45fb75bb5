"""Claims as they are written: what KAITO's provisioners read in them, and what we read again."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest

from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.claims import MACHINE, NODE_CLAIM, Claim, claim_names, manifest
from kaito_flows.nodes.node_classes import NodeClass
from kaito_flows.nodes.pools import LeaseRecord, pool_name

SIZE = "Standard_NC24ads_A100_v4"
NAME = "kf0123456789"
AKS = NodeClass("AKSNodeClass", "gpu")
GPU_PROVISIONER = NodeClass("KaitoNodeClass", "default")
REQUEST = NodeRequest(
    "phi-3",
    labels={"app": "phi-3"},
    any_of={"team": ("a", "b"), "topology.kubernetes.io/zone": ("1",)},
    namespace="team-a",
    run_id="run-1",
    gpus=1,
    disk_bytes=150 * 1024**3 - 1,
)
TIME = datetime(2026, 11, 25, 12, tzinfo=UTC)
RECORD = LeaseRecord("kaito-flows", Holder("team-a", "phi-3", "run-1"), "leased", TIME, TIME)


def made(
    node_class: NodeClass = AKS, kind: str = NODE_CLAIM, offer: Offer | None = None, **more: Any
) -> dict[str, Any]:
    given = {"request": REQUEST, "record": RECORD, "node_class": node_class} | more
    return manifest(kind, NAME, NAME, offer or Offer(SIZE, 1), **given)


def requirements(claim: dict[str, Any]) -> dict[str, str]:
    assert all(r["operator"] == "In" and len(r["values"]) == 1 for r in claim["spec"]["requirements"])
    return {r["key"]: r["values"][0] for r in claim["spec"]["requirements"]}


def test_a_node_claim_asks_for_what_kaitos_asks_for() -> None:
    claim = made()
    assert (claim["apiVersion"], claim["kind"]) == ("karpenter.sh/v1", "NodeClaim")
    assert requirements(claim) == {
        "karpenter.sh/nodepool": "kaito",
        "karpenter.sh/capacity-type": "on-demand",
        "karpenter.azure.com/sku-name": SIZE,
        "node.kubernetes.io/instance-type": SIZE,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    assert claim["spec"]["taints"] == [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}]
    assert claim["spec"]["nodeClassRef"] == {"group": "karpenter.azure.com", "kind": "AKSNodeClass", "name": "gpu"}
    assert claim["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
    labels = claim["metadata"]["labels"]
    assert labels["karpenter.sh/nodepool"] == "kaito"
    assert (labels["kaito.sh/workspace"], labels["kaito.sh/workspacenamespace"]) == ("phi-3", "team-a")
    assert labels["kaito.sh/machine-type"] == "gpu"


def test_a_machine_asks_for_what_kaitos_asked_for_up_to_0_3() -> None:
    claim = made(GPU_PROVISIONER, MACHINE)
    assert (claim["apiVersion"], claim["kind"]) == ("karpenter.sh/v1alpha5", "Machine")
    assert requirements(claim) == {
        "karpenter.sh/provisioner-name": "default",
        "kaito.sh/machine-type": "gpu",
        "node.kubernetes.io/instance-type": SIZE,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    assert claim["spec"]["machineTemplateRef"] == {"name": NAME}
    assert claim["metadata"]["labels"]["karpenter.sh/provisioner-name"] == "default"
    assert not {"nodeClassRef", "expireAfter", "terminationGracePeriod"} & set(claim["spec"])


def test_the_disk_is_asked_for_where_each_provider_reads_it_in_whole_gibibytes() -> None:
    asked = {"nvidia.com/gpu": "1"}
    assert made(AKS)["spec"]["resources"]["requests"] == {**asked, "ephemeral-storage": "150Gi"}
    assert made(GPU_PROVISIONER)["spec"]["resources"]["requests"] == {**asked, "storage": "150Gi"}
    small = NodeRequest("w")
    assert made(AKS, request=small)["spec"]["resources"]["requests"] == {}
    assert made(GPU_PROVISIONER, request=small)["spec"]["resources"]["requests"] == {"storage": "128Gi"}


def test_spot_and_zone_are_required_where_they_are_offered() -> None:
    found = requirements(made(offer=Offer(SIZE, 1, spot=True, zone="1"), zone="eastus-1"))
    assert found["karpenter.sh/capacity-type"] == "spot"
    assert found["topology.kubernetes.io/zone"] == "eastus-1"


def test_amazons_nodes_are_not_asked_for_an_azure_size() -> None:
    claim = made(NodeClass("EC2NodeClass", "gpu"), offer=Offer("g5.xlarge", 1))
    assert "karpenter.azure.com/sku-name" not in requirements(claim)
    assert claim["spec"]["nodeClassRef"]["group"] == "karpenter.k8s.aws"


def test_the_node_gets_the_labels_by_which_the_workspace_chooses_nodes_but_not_those_of_the_cloud() -> None:
    labels = made()["metadata"]["labels"]
    assert (labels["app"], labels["team"]) == ("phi-3", "a")
    assert "topology.kubernetes.io/zone" not in labels


def test_a_user_cannot_label_a_claim_into_another_pool() -> None:
    request = NodeRequest("w", labels={"kaito-flows/pool": "other", "karpenter.sh/nodepool": "theirs"})
    labels = made(request=request)["metadata"]["labels"]
    assert (labels["kaito-flows/pool"], labels["karpenter.sh/nodepool"]) == (NAME, "kaito")


def test_what_was_written_is_read_again() -> None:
    offer = Offer(SIZE, 1, spot=True, zone="2", price_usd_hour=1.5)
    found = Claim.of(made(offer=offer))
    assert found is not None
    assert (found.record, found.offer, found.count, found.pool) == (RECORD, offer, 1, NAME)


@pytest.mark.parametrize("key", ["owner", "run", "expires-at", "offer", "count"])
def test_a_claim_on_which_something_is_missing_is_nobodys(key: str) -> None:
    claim = made()
    del claim["metadata"]["annotations"][f"kaito-flows-{key}"]
    assert Claim.of(claim) is None


@pytest.mark.parametrize("key", ["state", "expires-at", "offer", "count"])
def test_a_claim_on_which_something_is_damaged_is_nobodys(key: str) -> None:
    claim = made()
    claim["metadata"]["annotations"][f"kaito-flows-{key}"] = "{"
    assert Claim.of(claim) is None


def test_a_claim_without_the_label_of_a_pool_is_nobodys() -> None:
    claim = made()
    del claim["metadata"]["labels"]["kaito-flows/pool"]
    assert Claim.of(claim) is None and Claim.of(None) is None


def test_names_are_those_that_an_agent_pool_may_have_and_no_two_are_the_same() -> None:
    pools = [pool_name("kaito-flows", REQUEST.holder, Offer(SIZE), attempt) for attempt in range(20)]
    names = [name for pool in pools for name in claim_names(pool, 4)]
    assert len(set(names)) == 80
    assert all(re.fullmatch(r"[a-z][a-z0-9]{0,11}", name) for name in names)
    assert claim_names(NAME, 1) == (NAME,)
    assert claim_names(NAME, 3)[:2] == claim_names(NAME, 2)
