"""The worker and the watcher as the base deploys them: a run gets a pod of its own, and both have enough rights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pod_fixtures import (
    IMAGE_TAG,
    Place,
    chats_image,
    pod_repository,
    push_secret,
    training_config,
    workspace,
)
from registry_fixtures import Registry

from kaito_flows.cluster.gateway import Cluster

from .conftest import Installer

PREFECT = Path(sys.executable).parent / "prefect"
COMMAND = Path(sys.executable).parent / "kaito-flows"


@pytest.fixture(scope="module")
def api(pod_host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server that pods reach."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind((pod_host, 0))
        port = probe.getsockname()[1]
    url = f"http://{pod_host}:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": url}
    with (home / "log").open("wb") as log:
        command = [PREFECT, "server", "start", "--host", pod_host, "--port", str(port)]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not _answers(url):
                assert time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.3)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(api: str, path: str, **body: Any) -> Any:
    for _ in range(20):
        response = httpx.post(f"{api}/{path}", json=body, timeout=30)
        if response.status_code != 503:  # a server on SQLite is busy at times
            break
        time.sleep(0.5)
    response.raise_for_status()
    return response.json()


NAME = "tiny"


@pytest.fixture(scope="module")
def control_plane(
    installed: Installer,
    here: list[dict[str, Any]],
    api: str,
    images: dict[str, str],
    pod_registry: Registry,
    workspaces_crd: str,
) -> Iterator[Installer]:
    """The worker and the watcher, up, with a namespace whose Workspaces they run: their own."""
    namespace = installed.namespace
    for manifest in here:
        if "job-template.json" in (data := manifest.get("data", {})):
            template = json.loads(data["job-template.json"])
            template["variables"]["properties"]["namespace"]["default"] = namespace
            data["job-template.json"] = json.dumps(template)
        elif "PREFECT_API_URL" in data:
            data["PREFECT_API_URL"] = api
            data["KAITO_FLOWS_WORKER_IMAGE"] = f"kaito-flows/worker:{IMAGE_TAG}"
            data["KAITO_FLOWS_TUNER_IMAGE"] = images["tuner"]
            data["KAITO_FLOWS_SERVER_IMAGE"] = images["server"]
            data["KAITO_FLOWS_INSECURE_REGISTRIES"] = pod_registry.host
            # Two cores for everything.
            data["KAITO_FLOWS_JOB_CPU"], data["KAITO_FLOWS_JOB_MEMORY"] = "50m", "256Mi"
            data["KAITO_FLOWS_CHECKPOINT_SECONDS"] = "0"
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] == "kaito-flows-watcher":
            manifest["spec"]["template"]["spec"]["containers"][0]["args"] = ["--namespace", namespace]
    installed.apply([m for m in here if m["kind"] in ("ConfigMap", "Deployment")])
    installed("apply", "-f", "-", stdin=push_secret(pod_registry))
    try:
        eventually(lambda: all(_is_ready(d) for d in installed.get("deployments")["items"]), 240, "up")
        yield installed
    except AssertionError:
        sys.stderr.write(installed.run("describe", "pods").stdout)
        raise
    finally:
        for container in ("work-pool", "deployments", "automations", "worker"):
            logs = ("logs", "deployment/kaito-flows-worker", "--container", container, "--tail=40")
            sys.stderr.write(installed.run(*logs).stdout)
        sys.stderr.write(installed.run("logs", "deployment/kaito-flows-watcher").stdout)
        for item in installed.get("workspaces")["items"]:
            installed.run("delete", "workspace", item["metadata"]["name"], "--timeout=60s")
        installed("delete", "deployment", "kaito-flows-worker", "kaito-flows-watcher")


@pytest.fixture(scope="module")
def spot(control_plane: Installer, cluster: Cluster, pod_registry: Registry) -> Place:
    """Where the Workspaces go."""
    return Place(control_plane, cluster.within(control_plane.namespace), pod_registry)


def eventually(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not {what} after {seconds:.0f} s"
        time.sleep(0.5)


def _is_ready(deployment: dict[str, Any]) -> bool:
    return bool(deployment["status"].get("readyReplicas"))


def command(*arguments: str) -> str:
    """What the command line prints."""
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=True).stdout


def condition(place: Place, name: str) -> dict[str, Any]:
    """The condition WorkspaceSucceeded."""
    conditions = place.kubectl.get("workspace", name)["status"]["conditions"]
    return next(c for c in conditions if c["type"] == "WorkspaceSucceeded")


def state(place: Place, name: str) -> str:
    return str(place.kubectl.get("workspace", name).get("status", {}).get("state", ""))


def told(place: Place, name: str) -> list[dict[str, Any]]:
    """What a Workspace's tuning pods tell, by their logs."""
    selector = f"kaito.sh/workspace={name},app.kubernetes.io/component=tuner"
    pods = place.kubectl.get("pods", "--selector", selector)["items"]
    logs = [place.kubectl.run("logs", pod["metadata"]["name"], "--container", "tuner").stdout for pod in pods]
    return [json.loads(line) for log in logs for line in log.splitlines() if line.startswith('{"event"')]


def runs(api: str, place: Place, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(
        api, "flow_runs/filter", flow_runs={"tags": {"all_": [f"workspace:{place.namespace}/{name}"]}}
    )
    return found


@pytest.mark.cluster
def test_the_worker_and_the_watcher_have_the_rights_they_need(control_plane: Installer, api: str) -> None:
    for name in ("worker", "watcher"):
        log = control_plane("logs", f"deployment/kaito-flows-{name}").lower()
        assert "forbidden" not in log and "denied" not in log, log
    ours = {deployment["entrypoint"].rpartition(".")[2] for deployment in ask(api, "deployments/filter")}
    assert ours == {"tune_workspace", "serve_workspace", "reap_nodes"}
    assert {found["name"] for found in ask(api, "automations/filter")} == {
        "crash-zombies", "resume-crashed", "reap-after-deletion",
    }  # fmt: skip


@pytest.mark.cluster
def test_the_watcher_answers_prometheus(control_plane: Installer) -> None:
    [pod] = control_plane.get("pods", "--selector", "app.kubernetes.io/component=watcher")["items"]
    port = pod["metadata"]["annotations"]["prometheus.io/port"]
    answer = httpx.get(f"http://{pod['status']['podIP']}:{port}/metrics", timeout=10)
    assert 'kaito_flows_workspaces{state="Running"} ' in answer.text


@pytest.mark.cluster
def test_the_reaper_runs_in_a_pod_of_its_own(control_plane: Installer, api: str) -> None:
    [reaper] = [found for found in ask(api, "deployments/filter") if found["entrypoint"].endswith(".reap_nodes")]
    ask(api, f"deployments/{reaper['id']}/create_flow_run")

    def states() -> set[str]:
        found = ask(api, "flow_runs/filter", flows={"name": {"any_": ["reap-nodes"]}})
        return {run["state"]["type"] for run in found}

    eventually(lambda: states() & {"COMPLETED", "FAILED", "CRASHED"}, 90, "reaped")
    assert "COMPLETED" in states()


@pytest.mark.cluster
def test_a_workspace_that_is_applied_is_tuned_served_and_gone_when_it_is_deleted(spot: Place, api: str) -> None:
    document = workspace(spot, NAME, chats_image(spot), config=training_config(spot))
    spot.kubectl("apply", "-f", "-", stdin=document)
    eventually(lambda: state(spot, NAME) in ("Succeeded", "Failed"), 240, "over")
    header, row = spot.kubectl("get", "workspace", NAME).splitlines()
    assert header.split()[:6] == [
        "NAME", "INSTANCE", "RESOURCEREADY", "INFERENCEREADY", "JOBSTARTED", "WORKSPACESUCCEEDED"
    ]  # fmt: skip
    described = spot.kubectl("describe", "workspace", NAME)
    assert row.split()[1:6] == ["True", "True", "True", "True", "Succeeded"], described
    [run] = runs(api, spot, NAME)
    assert run["state"]["type"] == "COMPLETED"

    service = spot.kubectl.get("service", NAME)["spec"]
    assert [port["port"] for port in service["ports"]] == [80, 29500]
    question = {"messages": [{"role": "user", "content": "Say red 8."}], "generate_kwargs": {"max_length": 64}}
    answer = httpx.post(f"http://{service['clusterIP']}/chat", json=question, timeout=60)
    assert answer.status_code == 200
    assert isinstance(answer.json()["Result"], str)
    assert json.loads(command("chat", NAME, "Say red 8.", "--json", "-n", spot.namespace))["model"] == NAME
    listed = command("status", "-n", spot.namespace)
    assert NAME in listed and "Succeeded" in listed

    # The same again is no new run.
    spot.kubectl("apply", "-f", "-", stdin=document)
    assert len(runs(api, spot, NAME)) == 1
    begun = time.monotonic()
    deleted = spot.kubectl.run("delete", "workspace", NAME, "--timeout=60s")
    assert deleted.returncode == 0, spot.kubectl.run("logs", "deployment/kaito-flows-watcher", "--tail=40").stdout
    kinds = "jobs,deployments,services,pods,configmaps"
    eventually(
        lambda: not spot.kubectl.get(kinds, "--selector", f"kaito.sh/workspace={NAME}")["items"], 30, "gone with all"
    )
    assert time.monotonic() - begun < 30
    deletions = [run["state"]["type"] for run in runs(api, spot, NAME) if run["name"].startswith("delete-")]
    assert "COMPLETED" in deletions


@pytest.mark.cluster
def test_when_the_whole_control_plane_is_killed_the_job_goes_on_and_the_run_takes_it_up(spot: Place, api: str) -> None:
    name = "survivor"
    config = training_config(spot, "long", max_steps=150, save_steps=20)
    document = workspace(
        spot, name, chats_image(spot), config=config, metadata={"annotations": {"kaito-flows/serve": "false"}}
    )
    spot.kubectl("apply", "-f", "-", stdin=document)
    tuner = ("--selector", f"kaito.sh/workspace={name},app.kubernetes.io/component=tuner")
    eventually(lambda: any(e.get("step", 0) >= 2 for e in told(spot, name)), 180, "training")
    [job] = spot.kubectl.get("jobs", *tuner)["items"]
    for selector in ("flow", "worker", "watcher"):
        which = f"app.kubernetes.io/component={selector}"
        spot.kubectl("delete", "pods", "--selector", which, "--grace-period=0", "--force")
    eventually(lambda: state(spot, name) in ("Succeeded", "Failed"), 400, "over")
    described = spot.kubectl("describe", "workspace", name)
    assert state(spot, name) == "Succeeded", described
    [run] = runs(api, spot, name)
    assert run["run_count"] > 1
    left = spot.kubectl.get("jobs", *tuner)["items"]
    assert {item["metadata"]["uid"] for item in left} <= {job["metadata"]["uid"]}
    images = pod_repository(spot, name).tags()
    assert images["latest"] == next(digest for tag, digest in images.items() if tag.startswith("run-"))


@pytest.mark.cluster
def test_a_training_that_is_paused_frees_its_gpu_and_goes_on_from_its_checkpoint(spot: Place, api: str) -> None:
    name = "patient"
    config = training_config(spot, "patient", max_steps=500, save_steps=10)  # some seconds, however fast
    document = workspace(
        spot, name, chats_image(spot), config=config, metadata={"annotations": {"kaito-flows/serve": "false"}}
    )
    spot.kubectl("apply", "-f", "-", stdin=document)
    eventually(lambda: any(e["event"] == "checkpoint" for e in told(spot, name)), 180, "at its first checkpoint")
    spot.kubectl("annotate", "workspace", name, "kaito-flows/pause=true")
    tuner = ("--selector", f"kaito.sh/workspace={name},app.kubernetes.io/component=tuner")
    eventually(lambda: not spot.kubectl.get("jobs,pods", *tuner)["items"], 60, "without a pod")
    eventually(lambda: condition(spot, name)["reason"] == "workspacePaused", 30, "told to be paused")
    eventually(lambda: runs(api, spot, name)[0]["state"]["type"] == "CANCELLED", 30, "cancelled")
    tags = pod_repository(spot, name).tags()
    assert any(tag.startswith("checkpoint-") for tag in tags) and "latest" not in tags

    spot.kubectl("annotate", "workspace", name, "kaito-flows/pause-")
    eventually(lambda: any(e["event"] == "resumed" for e in told(spot, name)), 120, "resumed")
    [resumed] = [event for event in told(spot, name) if event["event"] == "resumed"]
    assert resumed["step"] >= 10
    eventually(lambda: state(spot, name) in ("Succeeded", "Failed"), 180, "over")
    assert state(spot, name) == "Succeeded", spot.kubectl("describe", "workspace", name)
    assert sorted(run["state"]["type"] for run in runs(api, spot, name)) == ["CANCELLED", "COMPLETED"]
    assert "latest" in pod_repository(spot, name).tags()
