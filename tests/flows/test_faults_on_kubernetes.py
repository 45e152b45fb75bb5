"""What can go wrong on a cluster: who is killed is taken up, who is at fault is told, and nothing is left behind."""

from __future__ import annotations

import base64
import contextvars
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import Proxy
from fake_nodes import MARK, fake_node
from pod_fixtures import PUSH_SECRET, Place, chats_image, pod_repository, training_config, workspace
from prefect.settings import PREFECT_API_URL
from waiting import eventually

from kaito_flows.errors import InputError, OutOfMemoryError, RunError
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.oci.images import build_image
from kaito_flows.tasks.progress import listening
from kaito_flows.workspace import WorkspaceV1beta1
from kaito_flows.workspace.status import reason_of

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]

Document = dict[str, Any]

STEPS = 30

_RUN = """
import json, sys
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.workspace import WorkspaceV1beta1
tune_workspace(WorkspaceV1beta1.model_validate(json.loads(sys.argv[1])), serve=False)
"""


def run(document: Document, on_event: Callable[[dict[str, Any]], None] = lambda event: None) -> dict[str, Any]:
    """Run the flow on a Workspace, without a service; hand over what the job tells."""

    def listener(stage: str, event: dict[str, Any]) -> None:
        if stage == "tune":
            on_event(event)

    with listening(listener):
        facts: dict[str, Any] = tune_workspace(WorkspaceV1beta1.model_validate(document), serve=False)
    return facts


def condition(place: Place, name: str) -> dict[str, Any]:
    """The Workspace's condition `WorkspaceSucceeded`."""
    conditions = place.kubectl.get("workspace", name)["status"]["conditions"]
    return next(c for c in conditions if c["type"] == "WorkspaceSucceeded")


def left(place: Place) -> list[str]:
    """What of kaito-flows is in the namespace, Workspaces aside."""
    kinds = "jobs,pods,services,deployments,configmaps"
    found = place.kubectl.get(kinds, "-l", "app.kubernetes.io/managed-by=kaito-flows")["items"]
    return [f"{item['kind']} {item['metadata']['name']}" for item in found]


def job_uids(place: Place) -> list[str]:
    return [job["metadata"]["uid"] for job in place.cluster.list("Job")]


def newest_pod(place: Place) -> str:
    pods = [pod for pod in place.cluster.list("Pod") if "deletionTimestamp" not in pod["metadata"]]
    name: str = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])["metadata"]["name"]
    return name


def is_training(place: Place) -> bool:
    """Whether a pod has told of a step."""
    pods = [pod for pod in place.cluster.list("Pod") if pod["status"].get("phase") == "Running"]
    return any('"progress"' in place.cluster.read_logs(pod["metadata"]["name"], "tuner", tail=40) for pod in pods)


def tags(place: Place, name: str) -> list[str]:
    return sorted(pod_repository(place, name).tags())


@pytest.mark.timeout(1200)
def test_whoever_is_killed_the_same_adapter_comes_of_it_and_no_job_is_made_twice(
    place: Place, proxy: Proxy, tmp_path: Path
) -> None:
    name = f"a-{'long-' * 12}z"
    assert len(name) == 63
    data = chats_image(place)
    config = training_config(place, max_steps=STEPS)
    document = workspace(place, name, data, config=config, tuning={"output": output(place, "battered")})
    place.kubectl("apply", "-f", "-", stdin=document)

    # The run is killed: its job goes on without it, though its pod is evicted, too.
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or ""}
    with (tmp_path / "first.log").open("w") as log:
        command = [sys.executable, "-c", _RUN, json.dumps(document)]
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    eventually(lambda: is_training(place) or first.poll() is not None, 240)
    assert first.poll() is None, (tmp_path / "first.log").read_text()
    first.kill()
    first.wait()
    place.kubectl("delete", "pod", newest_pod(place), "--wait=false")
    uids = job_uids(place)
    assert len(uids) == 1

    # The next run takes the job up. The next pod is lost without a word, and the API server is away for a minute.
    told: list[str] = []
    seen: set[str] = set()
    outages: list[threading.Thread] = []

    def on_event(event: dict[str, Any]) -> None:
        told.append(event["event"])
        seen.update(job_uids(place))
        if event["event"] == "checkpoint" and "resumed" in told and not outages:
            place.kubectl("delete", "pod", newest_pod(place), "--grace-period=0", "--force")
            outages.append(proxy.cut_for(60))

    battered = run(document, on_event)
    outages[0].join()
    assert told.count("resumed") == 2
    assert seen == set(uids)
    assert condition(place, name)["status"] == "True"
    eventually(lambda: left(place) == [], 40)  # pods of a removed job take their time

    # Once more from the start: the node vanishes before it takes the pod, and what runs on another is left in peace.
    place.kubectl("delete", "workspace", name)
    real = next(meta(node)["name"] for node in place.cluster.list("Node") if MARK not in meta(node)["labels"])
    node = f"vanishes-{place.namespace.rpartition('-')[2]}"
    resource = {"labelSelector": {"matchLabels": {MARK: node}}}
    again = workspace(place, name, data, config=config, resource=resource, tuning={"output": output(place, "calm")})
    codes: list[str] = []

    def vanish(event: dict[str, Any]) -> None:
        codes.append(event["event"])
        if MARK in event.get("name", "") and place.cluster.delete("Node", node):
            place.cluster.patch("Node", real, {"metadata": {"labels": {MARK: node}}})

    try:
        with fake_node(place.cluster, node, taint=True):
            calm = run(again, vanish)
    finally:
        place.cluster.patch("Node", real, {"metadata": {"labels": {MARK: None}}})
    assert "leased" in codes
    assert "resumed" not in codes
    assert place.kubectl.get("workspace", name)["status"]["workerNodes"] == [real]
    assert not calm["reused"]
    assert battered["adapter"]["digest"] == calm["adapter"]["digest"]


def meta(found: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = found["metadata"]
    return metadata


def output(place: Place, name: str) -> dict[str, Any]:
    return {"image": place.image(name), "imagePushSecret": PUSH_SECRET}


def in_background(pool: ThreadPoolExecutor, document: Document, on_event: Callable[[dict[str, Any]], None]) -> Any:
    """Start the flow in a thread that has this one's Prefect server."""
    return pool.submit(contextvars.copy_context().run, run, document, on_event)


@pytest.mark.timeout(900)
def test_a_workspace_that_is_edited_is_tuned_anew_and_one_that_is_deleted_not_at_all(place: Place) -> None:
    data = chats_image(place)
    first = workspace(place, "tiny", data, config=training_config(place, "first", max_steps=5000))
    second = workspace(place, "tiny", data, config=training_config(place, "second", max_steps=4000))
    began: list[str] = []
    deleted_at: list[float] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and not began:
            began.extend(job_uids(place))

    def delete(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and not deleted_at:
            assert set(job_uids(place)).isdisjoint(began)  # there is one Job, and it is new
            assert len([name for name in left(place) if name.startswith("ConfigMap")]) == 1
            assert condition(place, "tiny")["observedGeneration"] == 2
            place.kubectl("delete", "workspace", "tiny")
            deleted_at.append(time.monotonic())

    with ThreadPoolExecutor() as pool:
        place.kubectl("apply", "-f", "-", stdin=first)
        old = in_background(pool, first, on_event)
        eventually(lambda: began or old.done(), 300)
        place.kubectl("apply", "-f", "-", stdin=second)
        new = in_background(pool, second, delete)
        with pytest.raises(RunError) as changed:
            old.result(timeout=300)
        eventually(lambda: deleted_at or new.done(), 300)
        eventually(lambda: not left(place), 30)
        with pytest.raises(RunError) as deleted:
            new.result(timeout=120)
    assert (changed.value.code, deleted.value.code) == ("workspace-changed", "workspace-deleted")
    assert changed.value.hint and deleted.value.hint
    # Neither has published anything under the user's tag, nor written to the Workspace that is gone.
    assert "latest" not in tags(place, "tiny")
    assert place.kubectl.get("workspaces")["items"] == []


def test_a_pod_that_takes_too_much_memory_is_told_as_that(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {"type": "Container", "default": {"memory": "48Mi"}, "defaultRequest": {"memory": "48Mi"}}
    manifest = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": {"limits": [limit]}}
    place.kubectl("apply", "-f", "-", stdin=manifest)
    monkeypatch.setenv("KAITO_FLOWS_JOB_MEMORY", "48Mi")
    document = workspace(place, "large", chats_image(place), config=training_config(place))
    place.kubectl("apply", "-f", "-", stdin=document)
    with pytest.raises(OutOfMemoryError) as failed:
        run(document)
    assert "48Mi" in failed.value.message
    assert failed.value.hint
    told = condition(place, "large")
    assert (told["status"], told["reason"]) == ("False", "OutOfMemory")
    assert failed.value.message in told["message"] and failed.value.hint in told["message"]
    assert failed.value.message in place.kubectl("describe", "workspace", "large")
    eventually(lambda: not left(place), 30)


def config_map(place: Place, name: str, **data: str) -> str:
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
    place.kubectl("apply", "-f", "-", stdin=manifest)
    return name


def registry_secret(place: Place, name: str, **data: str) -> dict[str, Any]:
    encoded = {key: base64.b64encode(text.encode()).decode() for key, text in data.items()}
    manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}
    place.kubectl("apply", "-f", "-", stdin=manifest)
    return {"image": place.image("tiny"), "imagePushSecret": name}


def wrong_password(place: Place) -> dict[str, Any]:
    login = base64.b64encode(f"{place.registry.user}:wrong".encode()).decode()
    config = json.dumps({"auths": {place.registry.host: {"auth": login}}})
    return {"tuning": {"output": registry_secret(place, "wrong", **{".dockerconfigjson": config})}}


def data_of(place: Place, name: str, text: str) -> dict[str, Any]:
    build_image(pod_repository(place, "odd"), [{name: text.encode()}], annotations={}, tag="latest")
    return {"tuning": {"input": {"image": place.image("odd"), "imagePullSecrets": [PUSH_SECRET]}}}


def rival(place: Place) -> dict[str, Any]:
    """Another Workspace, which is older, publishes to the same tag."""
    document = workspace(place, "rival", chats_image(place))
    document["tuning"]["output"]["image"] = place.image("tiny")
    place.kubectl("apply", "-f", "-", stdin=document)
    time.sleep(1.1)  # an object's age is known in seconds
    return {}


FAULTS: dict[str, tuple[Callable[[Place], dict[str, Any]], str, str]] = {
    "no Secret": (
        lambda place: {"tuning": {"output": {"image": place.image("tiny"), "imagePushSecret": "nowhere"}}},
        "secret-not-found",
        "/nowhere: there is none of this name",
    ),
    "a Secret that is none for a registry": (
        lambda place: {"tuning": {"output": registry_secret(place, "odd", token="x")}},
        "invalid-secret",
        "/odd: it has no key .dockerconfigjson",
    ),
    "a wrong password": (wrong_password, "push-refused", "/tiny"),
    "no ConfigMap": (lambda place: {"config": "nowhere"}, "config-map-not-found", "/nowhere: there is none"),
    "a ConfigMap without the key": (
        lambda place: {"config": config_map(place, "odd", text="x")},
        "config-map-not-found",
        "/odd: it has no key 'training_config.yaml'; it has text",
    ),
    "an unknown training argument": (
        lambda place: {"config": training_config(place, "odd", max_stepz=3)},
        "unknown-key",
        "TrainingArguments.max_stepz",
    ),
    "an image without data": (
        lambda place: data_of(place, "data/README.md", "# Nothing"),
        "dataset-empty",
        "/odd",
    ),
    "rows that are no chats": (
        lambda place: data_of(place, "data/odd.jsonl", '{"temperature": 20.5}\n' * 40),
        "dataset-columns",
        "temperature",
    ),
    "a label that no node has": (
        lambda place: {"resource": {"labelSelector": {"matchLabels": {"apps": "nowhere"}}}},
        "no-node",
        "no node has the labels apps=nowhere",
    ),
    "more GPUs than a node has": (
        lambda place: {"metadata": {"annotations": {"kaito-flows/gpus": "16"}}},
        "no-node",
        "nvidia.com/gpu, not 16",
    ),
    "a tag that another publishes to": (rival, "output-taken", "the Workspace rival publishes to"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_told_before_anything_runs(place: Place, fault: str) -> None:
    change, code, said = FAULTS[fault]
    document = workspace(place, "tiny", chats_image(place), **change(place))
    place.kubectl("apply", "-f", "-", stdin=document)
    with pytest.raises((InputError, RunError)) as failed:
        run(document)
    assert failed.value.code == code
    assert said in str(failed.value)
    assert failed.value.hint
    told = condition(place, "tiny")
    assert (told["status"], told["reason"], told["message"]) == ("False", reason_of(code), str(failed.value))
    eventually(lambda: left(place) == [], 40)  # pods of a removed job take their time
    assert "latest" not in tags(place, "tiny")
