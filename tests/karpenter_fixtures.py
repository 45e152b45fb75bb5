"""Karpenter's API in the cluster that tests have: the definitions that it lacks, for as long as the tests run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_nodes import MARK
from provisioner import Provisioner
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.refusals import ConflictError

_DEFINITIONS = Path(__file__).parent / "karpenter_crds"


@pytest.fixture(scope="session")
def karpenter_crds(cluster: Cluster) -> Iterator[None]:
    """NodeClaims, Machines and AKSNodeClasses are served; what was not there before is gone after the tests."""
    made = []
    try:
        for path in sorted(_DEFINITIONS.glob("*.yaml")):
            definition = yaml.safe_load(path.read_text())
            name = definition["metadata"]["name"]
            definition["metadata"]["labels"] = {MARK: "true"}
            try:
                cluster.create(definition)
                made.append(name)
            except ConflictError:
                there = cluster.get("CustomResourceDefinition", name) or definition
                if MARK not in there["metadata"].get("labels", {}):
                    pytest.skip("the cluster has a Karpenter of its own, which would rent real nodes")
        for kind in ("NodeClaim", "Machine", "AKSNodeClass"):
            eventually(lambda kind=kind: cluster.served(kind), seconds=20, every=0.2)  # type: ignore[misc]
        yield
    finally:
        for name in made:
            cluster.delete("CustomResourceDefinition", name)


@pytest.fixture(scope="module")
def node_class(cluster: Cluster, karpenter_crds: None) -> Iterator[str]:
    """A node class, as the settings name it."""
    name = f"test-{secrets.token_hex(3)}"
    spec = {"imageFamily": "Ubuntu2204", "osDiskSizeGB": 300}
    cluster.create(
        {"apiVersion": "karpenter.azure.com/v1beta1", "kind": "AKSNodeClass", "metadata": {"name": name}, "spec": spec}
    )
    yield f"AKSNodeClass/{name}"
    cluster.delete("AKSNodeClass", name)


@pytest.fixture
def provisioner(space: Cluster, karpenter_crds: None) -> Iterator[Provisioner]:
    """Somebody who makes nodes of the claims of Workspaces in `space`."""
    with Provisioner(space) as provisioner:
        yield provisioner
