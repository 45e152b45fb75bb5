"""The platform on a real cluster: what never starts is told and removed, and nobody removes what another run made."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_fixtures import BUSYBOX
from fake_nodes import MARK, fake_node
from kubectl_fixtures import Kubectl
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError, ImagePullError, InputError, KaitoFlowsError, RunError, SchedulingError
from kaito_flows.nodes import NodeRequest
from kaito_flows.nodes.existing import ExistingNodes
from kaito_flows.platforms import JobSpec, Placement
from kaito_flows.platforms.kubernetes import KubernetesPlatform
from kaito_flows.settings import Settings
from kaito_flows.workspace import WorkspaceV1beta1
from kaito_flows.workspace.status import WorkspaceStatus

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("workspaces_crd")]

NAMESPACE = "faults"
Event = dict[str, Any]


def document(name: str) -> WorkspaceV1beta1:
    return WorkspaceV1beta1.model_validate(
        {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": name},
            "resource": {"labelSelector": {"matchLabels": {"kubernetes.io/os": "linux"}}},
            "tuning": {
                "preset": {"name": "tiny-phi-3"},
                "method": "lora",
                "input": {"urls": ["https://example.com/x.json"]},
                "output": {"image": "registry.example/x:latest", "imagePushSecret": "push"},
            },
        }
    )


def platform(space: Cluster, name: str, **settings: Any) -> KubernetesPlatform:
    """The platform, as it is when a run has begun with a Workspace of that name."""
    given = {"tuner_image": BUSYBOX, "job_memory": "16Mi", "job_cpu": "10m", **settings}
    made = KubernetesPlatform(Settings(platform="kubernetes", **given), cluster=space)
    made.begin(document(name))
    return made


def job(workspace: str, *nodes: str, **changes: Any) -> JobSpec:
    return JobSpec(f"tune-{workspace}", workspace, "tuner", {"version": 1}, placement=Placement(nodes), **changes)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, after how many seconds, and what it told while it waited."""

    error: KaitoFlowsError
    seconds: float
    told: list[Event]


def fail(made: KubernetesPlatform, spec: JobSpec) -> Outcome:
    told: list[Event] = []
    start = time.monotonic()
    with pytest.raises(KaitoFlowsError) as failed:
        made.run_job(spec, told.append)
    return Outcome(failed.value, time.monotonic() - start, told)


@pytest.fixture(scope="module")
def outcomes(space: Cluster, cluster: Cluster, workspaces_crd: str) -> Iterator[dict[str, Outcome]]:
    """Jobs that never start, all at once: each takes a minute to be sure of that."""
    large = {"limits": [{"type": "Container", "max": {"cpu": "2"}}]}
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "large"}, "spec": large}
    Kubectl(workspaces_crd, space.namespace)("apply", "-f", "-", stdin=limits)
    suffix = space.namespace.rpartition("-")[2]
    with (
        fake_node(cluster, f"kept-{suffix}", taint=True) as kept,
        fake_node(cluster, f"gone-{suffix}", taint=True) as gone,
        ThreadPoolExecutor(8) as pool,
    ):
        futures: dict[str, Future[Outcome]] = {}

        def start(name: str, spec: JobSpec, **settings: Any) -> None:
            futures[name] = pool.submit(fail, platform(space, name, **settings), spec)

        start("no-image", job("no-image"), tuner_image="127.0.0.1:1/none:1")
        start("no-program", job("no-program"))
        start("no-secret", job("no-secret", secrets=("nowhere",)))
        start("no-room", job("no-room", kept), pending_seconds=5)
        start("no-node", job("no-node", gone))
        start("refused", job("refused"), job_cpu="3")
        eventually(lambda: space.list("Pod", labels={"kaito.sh/workspace": "no-node"}))
        cluster.delete("Node", gone)
        yield {name: future.result(timeout=240) for name, future in futures.items()}


@pytest.mark.parametrize(
    ("name", "kind", "code", "said", "hint", "seconds"),
    [
        ("no-image", ImagePullError, "image-pull-failed", "127.0.0.1:1/none:1", "cannot be reached", 130),
        ("no-program", RunError, "container-not-started", "python", "has the program", 60),
        ("no-secret", InputError, "secret-not-found", '"nowhere" not found', "create the Secret", 100),
        ("no-room", SchedulingError, "unschedulable", MARK, "the nodes are kept for others", 60),
        ("no-node", RunError, "node-lost", "gone-", "on another node", 130),
        ("refused", InputError, "pod-refused", "3", "the namespace's rules", 100),
    ],
)
def test_a_job_that_never_starts_ends_with_the_reason_and_is_removed(
    outcomes: dict[str, Outcome],
    space: Cluster,
    name: str,
    kind: type[KaitoFlowsError],
    code: str,
    said: str,
    hint: str,
    seconds: float,
) -> None:
    outcome = outcomes[name]
    assert isinstance(outcome.error, kind)
    assert (outcome.error.code, said in outcome.error.message, hint in outcome.error.hint) == (code, True, True), (
        outcome.error
    )
    assert outcome.seconds < seconds
    assert outcome.error.retryable == (code == "node-lost")
    mine = {"kaito.sh/workspace": name}
    eventually(lambda: not [*space.list("Job", labels=mine), *space.list("ConfigMap", labels=mine)], 30)
    eventually(lambda: not space.list("Pod", labels=mine), 120)


def test_who_waits_is_told_why_in_the_clusters_words(outcomes: dict[str, Outcome]) -> None:
    told = {name: " ".join(event["name"] for event in outcomes[name].told) for name in outcomes}
    assert MARK in told["no-room"]
    assert "127.0.0.1:1/none:1" in told["no-image"]
    assert "nowhere" in told["no-secret"]


def test_a_pod_that_is_made_while_others_are_deleted_goes_too(space: Cluster, busybox: str) -> None:
    """As a controller does that sees its pod go before it is gone itself."""
    made = platform(space, "again")

    def labelled(name: str) -> dict[str, Any]:
        labels = {"app.kubernetes.io/managed-by": "kaito-flows", "kaito.sh/workspace": "again"}
        deaf = {"name": "main", "image": busybox, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "600"]}
        return {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
            "spec": {"containers": [deaf], "terminationGracePeriodSeconds": 60, "nodeSelector": {}},
        }  # fmt: skip

    def make_another() -> None:
        for _, pod in space.watch("Pod", name="first", timeout_seconds=60):
            if "deletionTimestamp" in pod["metadata"]:
                space.create(labelled("second"))
                return

    space.create(labelled("first"))
    eventually(lambda: (space.get("Pod", "first") or {})["status"].get("phase") == "Running")
    with ThreadPoolExecutor() as pool:
        other = pool.submit(make_another)
        made.delete("again")
        other.result()
    assert [pod["metadata"]["name"] for pod in space.list("Pod", labels={"kaito.sh/workspace": "again"})] == []


def test_a_node_that_is_gone_is_not_leased_again(cluster: Cluster, space: Cluster) -> None:
    nodes = ExistingNodes(cluster)
    name = f"leased-{space.namespace.rpartition('-')[2]}"
    request = NodeRequest("x", labels={MARK: name}, gpus=4)
    with fake_node(cluster, name, taint=True):
        lease = nodes.lease(request, lambda *_: None)
        assert lease.nodes == (name,)
        assert nodes.alive(lease)
    assert not nodes.alive(lease)
    with pytest.raises(SchedulingError, match="no node has the labels") as none:
        nodes.lease(request, lambda *_: None)
    assert none.value.code == "no-node"


def test_logs_of_a_pod_whose_node_is_gone_come_to_an_end(cluster: Cluster, space: Cluster, busybox: str) -> None:
    name = f"dead-{space.namespace.rpartition('-')[2]}"
    with fake_node(cluster, name, taint=False):
        container = {"name": "main", "image": busybox}
        spec = {"nodeName": name, "containers": [container], "terminationGracePeriodSeconds": 1}
        space.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        running = {"name": "main", "image": busybox, "imageID": "", "ready": True, "restartCount": 0}
        running["state"] = {"running": {"startedAt": None}}
        space.patch("Pod", name, {"status": {"phase": "Running", "containerStatuses": [running]}}, "status")
        space.delete("Pod", name)
        start = time.monotonic()
        space.follow_logs(name, "main", on_line=lambda line: None)
        assert time.monotonic() - start < 60
        assert "deletionTimestamp" in (space.get("Pod", name) or {})["metadata"]
        space.delete("Pod", name, grace_seconds=0)


def test_a_run_of_a_workspace_that_was_made_anew_leaves_the_new_ones_job_alone(space: Cluster) -> None:
    nowhere = ("nowhere",)
    with ThreadPoolExecutor() as pool:

        def begin() -> tuple[Future[Outcome], Callable[[], str]]:
            made = platform(space, "again")

            def uid() -> str:
                found = space.get("Job", "tune-again")
                return str(found["metadata"]["uid"]) if found else ""

            return pool.submit(fail, made, job("again", *nowhere)), uid

        old, uid = begin()
        first = eventually(uid)
        space.delete("Workspace", "again")
        eventually(lambda: uid() != first)
        new, _ = begin()
        second = eventually(uid)
        assert old.result(timeout=60).error.code == "workspace-deleted"
        assert uid() == second
        platform(space, "again").delete("again")
        assert new.result(timeout=60).error.code == "workspace-deleted"
    assert not uid()
    assert space.get("ConfigMap", "tune-again") is None


def test_the_status_of_a_workspace_that_was_made_anew_is_not_the_old_runs_to_write(space: Cluster) -> None:
    def state_of(one: KubernetesPlatform) -> str:
        found = one.read_status("anew")
        return found.state if found else ""

    old = platform(space, "anew")
    space.delete("Workspace", "anew")
    new = platform(space, "anew")
    old.write_status(WorkspaceStatus("anew", "kaito.sh/v1beta1", "", state="Failed"))
    assert state_of(new) == "Pending"
    new.write_status(WorkspaceStatus("anew", "kaito.sh/v1beta1", "", state="Running"))
    assert state_of(new) == "Running"


def test_a_run_that_is_cancelled_leaves_no_job_and_no_config_map(space: Cluster) -> None:
    made = platform(space, "stopped")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(fail, made, job("stopped", "nowhere"))
        eventually(lambda: space.get("Job", "tune-stopped"))
        assert made.stop_jobs("stopped") == ["tune-stopped"]
        assert running.result(timeout=60).error.code == "job-deleted"
    assert space.get("Job", "tune-stopped") is None
    assert space.get("ConfigMap", "tune-stopped") is None


def test_who_has_no_rights_is_told_which_and_where_to_get_them(
    space: Cluster, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody"}})
    annotations = {"kubernetes.io/service-account.name": "nobody"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "nobody", "annotations": annotations}}
    space.create({**secret, "type": "kubernetes.io/service-account-token"})
    token = eventually(lambda: (space.get("Secret", "nobody") or {}).get("data", {}).get("token", ""))
    config = yaml.safe_load(kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": base64.b64decode(token).decode()}
    (tmp_path / "nobody.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nobody.yaml"))
    made = KubernetesPlatform(Settings(platform="kubernetes"), namespace=space.namespace)
    with pytest.raises(AccessError) as refused:
        made.begin(document("tiny"))
    user = f"system:serviceaccount:{space.namespace}:nobody"
    assert refused.value.message == f"{user} may not get workspaces.kaito.sh in namespace '{space.namespace}'"
    assert refused.value.hint == "a Role bound to it must allow 'get' on 'workspaces.kaito.sh'"
