"""Deleting a Workspace gives its nodes back, where the one who deletes it rents; and asks no cloud where not."""

from __future__ import annotations

import subprocess
import sys
from typing import cast

import pytest
from fake_cloud import FakeCloud, FakeCluster

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import CloudError
from kaito_flows.flows.delete_workspace import delete_workspace
from kaito_flows.nodes import opening
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the platform was asked to delete."""
    found: list[str] = []

    class Recorder:
        def __init__(self, namespace: str) -> None:
            self.namespace = namespace

        def delete(self, name: str) -> list[str]:
            found.append(f"{self.namespace}/{name}")
            return [f"job/{name}"]

    monkeypatch.setattr(f"{delete_workspace.fn.__module__}.platform_in", Recorder)
    return found


@pytest.fixture
def clouds(monkeypatch: pytest.MonkeyPatch) -> list[FakeCloud]:
    """Two clouds that are rented from."""
    found = [FakeCloud("karpenter"), FakeCloud("aks")]
    rented = [RentedNodes(cloud, cast(Cluster, FakeCluster(cloud)), Settings()) for cloud in found]
    monkeypatch.setattr(opening, "open_rented", lambda settings, kinds=(): rented)
    return found


def test_all_nodes_of_the_workspace_are_given_back_without_prefect_too(
    deleted: list[str], clouds: list[FakeCloud]
) -> None:
    first, second = clouds
    first.add("leased", "r1")
    first.add("serving", "r0", state="serving")
    first.add("other", "r2", workspace="other")
    first.add("elsewhere", "r3", namespace="another")
    second.add("kept", "r1", state="kept")
    assert delete_workspace.fn("team", "w") == ["job/w"]
    assert deleted == ["team/w"]
    assert (first.alive, second.alive) == (["other", "elsewhere"], [])


def test_a_cloud_that_fails_is_told_and_keeps_no_other(deleted: list[str], clouds: list[FakeCloud]) -> None:
    first, second = clouds
    first.add("leased", "r1")
    second.add("kept", "r1", state="kept")
    first.faults["delete"] = [CloudError("HTTP 503")]
    with pytest.raises(CloudError, match="HTTP 503"):
        delete_workspace.fn("team", "w")
    assert (first.alive, second.alive) == (["leased"], [])
    assert delete_workspace.fn("team", "w") == ["job/w"], "and it can be done again"
    assert first.alive == []


def test_where_nothing_is_rented_neither_azure_nor_the_official_client_is_loaded() -> None:
    program = """
import sys
from kaito_flows.flows import watch_workspaces
from kaito_flows.nodes.opening import release_all
from kaito_flows.settings import Settings
release_all(Settings(nodes="existing"), "team", "w")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "kopf" in loaded
    assert not {"azure", "msal", "kubernetes"} & loaded
