"""Tuning in another cluster when this one has no node: here another namespace, with a worker of its own, plays it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from arm_fixtures import A100
from kubectl_fixtures import own_namespace
from pod_fixtures import Place, chats_image, push_secret, training_config, workspace
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.settings import PREFECT_API_URL
from waiting import eventually

from kaito_flows.errors import SchedulingError
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.tasks import elsewhere
from kaito_flows.workspace import WorkspaceV1beta1

if TYPE_CHECKING:
    from arm import Azure
    from kubectl_fixtures import Kubectl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]

PREFECT = Path(sys.executable).parent / "prefect"
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def worker(environment: dict[str, str], log: Path) -> Iterator[None]:
    """A worker of the work pool `local`, and its deployments, with an environment of its own."""
    environment = {**os.environ, **environment, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    for command in (
        ["work-pool", "create", "local", "--type", "process", "--overwrite"],
        ["deploy", "--all", "--prefect-file", str(ROOT / "deployments" / "prefect.yaml")],
    ):
        subprocess.run([PREFECT, "--no-prompt", *command], env=environment, check=True, capture_output=True)
    with log.open("wb") as out:
        command = [str(PREFECT), "worker", "start", "--pool", "local", "--type", "process"]
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        yield
    finally:
        running.terminate()
        running.wait(60)


@pytest.fixture
def other(
    at_azure: Azure, place: Place, workspaces_crd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Kubectl]:
    """The other cluster's namespace: its worker takes the nodes that are there, and here Azure has no quota."""
    at_azure.usages = {name: [limit, limit] for name, (_, limit) in at_azure.usages.items()}
    monkeypatch.setattr(elsewhere, "LOOK_SECONDS", 0.5)
    with own_namespace(workspaces_crd, "elsewhere") as kubectl:
        kubectl("apply", "-f", "-", stdin=push_secret(place.registry))
        there = {"KAITO_FLOWS_NAMESPACE": kubectl.namespace, "KAITO_FLOWS_NODES": "existing"}
        there |= {"KAITO_FLOWS_HOME": str(tmp_path / "there"), "KAITO_FLOWS_ELSEWHERE": "nowhere"}
        log = tmp_path / "worker.log"
        with worker(there, log):
            yield kubectl
        sys.stderr.write(log.read_text()[-5000:])


def guests(run_id: str) -> list[Any]:
    wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(run_id)]))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=wanted)


def document(place: Place, name: str) -> dict[str, Any]:
    config = training_config(place, dtype="float32", max_steps=8)
    return workspace(place, name, chats_image(place), config=config, resource={"instanceType": A100})


def test_what_no_node_can_be_had_for_here_is_tuned_in_the_next_place_that_has_one(
    place: Place, other: Kubectl, at_azure: Azure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAITO_FLOWS_ELSEWHERE", "north,local")
    wanted = document(place, "roaming")
    place.kubectl("apply", "-f", "-", stdin=wanted)
    facts = tune_workspace(WorkspaceV1beta1.model_validate(wanted), serve=False)
    assert not facts["reused"]
    assert facts["metrics"]["evaluation"]["after"]["loss"] < facts["metrics"]["evaluation"]["before"]["loss"]
    status = place.kubectl.get("workspace", "roaming")["status"]
    assert status["state"] == "Succeeded"
    conditions = {c["type"]: (c["status"], c["message"]) for c in status["conditions"]}
    assert conditions["ResourceReady"] == ("True", "tuned in another place")
    assert conditions["JobStarted"][0] == "True"
    # It was another run's, in the other place alone, and nothing of it is left there.
    [guest] = guests(facts["flow_run_id"])
    assert guest.state.name == "Completed"
    assert guest.parameters["serve"] is False
    assert (at_azure.count("PUT"), other.get("workspaces")["items"]) == (0, [])
    eventually(lambda: other.get("pods")["items"] == [], 60)
    # The same inputs again: here is all that is needed, and nobody is asked.
    again = tune_workspace(WorkspaceV1beta1.model_validate(wanted), serve=False)
    assert (again["reused"], guests(again["flow_run_id"])) == (True, [])
    assert again["adapter"] == facts["adapter"]


def test_a_workspace_of_that_name_in_the_other_place_is_left_alone_and_every_place_is_named(
    place: Place, other: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAITO_FLOWS_ELSEWHERE", "north,local")
    wanted = document(place, "taken")
    place.kubectl("apply", "-f", "-", stdin=wanted)
    theirs = {**wanted, "metadata": {"name": "taken", "namespace": other.namespace}}
    other("apply", "-f", "-", stdin=theirs)
    with pytest.raises(SchedulingError) as failure:
        tune_workspace(WorkspaceV1beta1.model_validate(wanted), serve=False)
    assert failure.value.code == "no-node"
    for said in ("quota", "north: deployment-not-found", "local: workspace-differs"):
        assert said in str(failure.value)
    assert [item["metadata"]["name"] for item in other.get("workspaces")["items"]] == ["taken"]
    assert place.kubectl.get("workspace", "taken")["status"]["state"] == "Failed"
