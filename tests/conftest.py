"""What all tests share: one thread each for training, and the rule for services that are missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from arm_fixtures import at_azure, azure, steady
from cluster_fixtures import busybox, cluster, kubeconfig, proxy, space
from karpenter_fixtures import karpenter_crds, node_class, provisioner
from kubectl_fixtures import kubectl, workspaces_crd
from pod_fixtures import images, place, pod_host, pod_registry, shared_place
from registry_fixtures import registry, registry_with

__all__ = [
    "at_azure",
    "azure",
    "busybox",
    "cluster",
    "images",
    "karpenter_crds",
    "kubeconfig",
    "kubectl",
    "node_class",
    "place",
    "pod_host",
    "pod_registry",
    "provisioner",
    "proxy",
    "registry",
    "registry_with",
    "shared_place",
    "space",
    "steady",
    "workspaces_crd",
]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing a test does is a reason to talk to anybody outside of this machine.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def pytest_unconfigure() -> None:
    """Do not let the end of the tests wait for a Prefect server that is gone."""
    if "prefect.events.worker" in sys.modules:
        from kaito_flows.flows.leaving import leave_in_time

        leave_in_time()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A KAITO_FLOWS_HOME of the test's own."""
    folder = tmp_path / "kaito-flows"
    monkeypatch.setenv("KAITO_FLOWS_HOME", str(folder))
    monkeypatch.delenv("KAITO_FLOWS_SERVE_PORT", raising=False)
    return folder


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout."""
    return Path(__file__).parents[1]
