"""How little the platform asks of the API server, on one that counts."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest

from kaito_flows.cluster.ensuring import Ensured
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.logs import LogLine
from kaito_flows.errors import ImagePullError, InputError
from kaito_flows.platforms import JobSpec, following, kubernetes
from kaito_flows.platforms.kubernetes import KubernetesPlatform
from kaito_flows.platforms.pods import RANK_LABEL
from kaito_flows.settings import Settings
from kaito_flows.workspace import WorkspaceV1beta1

Object = dict[str, Any]
WORKSPACE = WorkspaceV1beta1.model_validate(
    {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "tiny"},
        "resource": {"labelSelector": {"matchLabels": {"kubernetes.io/os": "linux"}}},
        "tuning": {
            "preset": {"name": "tiny-phi-3"},
            "method": "lora",
            "input": {"urls": ["https://example.com/x.json"]},
            "output": {"image": "registry.example/x:latest"},
        },
    }
)
COMPLETED = '{"event": "completed"}'


class Counting:
    """An API server that knows one Secret and one job, whose pod goes through the given states."""

    namespace = "here"

    def __init__(self, *pods: Object, secrets: tuple[str, ...] = ()) -> None:
        self.pods, self.secrets = pods, secrets
        self.asked: Counter[str] = Counter()
        self.complete = False

    def get(self, kind: str, name: str) -> Object | None:
        self.asked[f"get {kind}"] += 1
        if kind == "Workspace":
            return None
        if kind == "Secret":
            return {"data": {".dockerconfigjson": base64.b64encode(b"{}").decode()}} if name in self.secrets else None
        return job(complete=self.complete)

    def create(self, manifest: Object) -> Object:
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "workspace-1", "generation": 1}}

    def apply(self, manifest: Object) -> Object:
        return {**manifest, "metadata": {**manifest["metadata"], "uid": "config-1"}}

    def ensure(self, manifest: Object, *, digest: str) -> Ensured:
        return Ensured(job(complete=False), "created")

    def delete(self, kind: str, name: str, **_: Any) -> bool:
        return True

    def watch(self, kind: str, **_: Any) -> Iterator[tuple[str, Object]]:
        self.asked[f"watch {kind}"] += 1
        if kind == "Job":
            self.complete = True
            yield "MODIFIED", job(complete=True)
            return
        for pod in self.pods:
            yield "MODIFIED", pod

    def list(self, kind: str, **_: Any) -> list[Object]:
        self.asked[f"list {kind}"] += 1
        return []

    def events(self, target: Object) -> list[Object]:
        self.asked["list Event"] += 1
        return []

    def follow_logs(self, pod: str, container: str, *, on_line: Any) -> None:
        self.asked[f"follow {container}"] += 1
        if container == "tuner":
            on_line(LogLine("2026-01-01T00:00:00Z", COMPLETED))


def job(*, complete: bool) -> Object:
    conditions = [{"type": "Complete", "status": "True"}] if complete else []
    metadata = {"name": "tune", "uid": "job-1"}
    return {
        "kind": "Job",
        "metadata": metadata,
        "spec": {"template": {"spec": {}}},
        "status": {"conditions": conditions},
    }


def pod(phase: str, *, node: str = "", weights: Object | None = None, tuner: Object | None = None) -> Object:
    scheduled = {"type": "PodScheduled", "status": "True" if node else "False", "reason": "Unschedulable"}
    if not node:
        scheduled["message"] = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    status: Object = {"phase": phase, "conditions": [scheduled]}
    if weights is not None:
        status["initContainerStatuses"] = [{"name": "weights", "image": "x", "state": weights}]
    if tuner is not None:
        status["containerStatuses"] = [{"name": "tuner", "image": "x", "state": tuner}]
    return {
        "metadata": {
            "name": "tune-1",
            "namespace": "here",
            "uid": "pod-1",
            "labels": {RANK_LABEL: "0"},
            "ownerReferences": [{"uid": "job-1"}],
        },
        "spec": {
            "nodeName": node,
            "initContainers": [{"name": "weights", "image": "x"}],
            "containers": [{"name": "tuner", "image": "x"}],
        },
        "status": status,
    }


def follow(server: Counting) -> Object:
    platform = KubernetesPlatform(Settings(platform="kubernetes"), cluster=cast(Cluster, server))
    platform.begin(WORKSPACE)
    return platform.run_job(JobSpec("tune", "tiny", "tuner", {"version": 1}), lambda event: None)


def test_a_job_is_followed_in_one_watch_until_its_program_has_ended() -> None:
    ended: Object = {"terminated": {"exitCode": 0}}
    server = Counting(
        pod("Pending"),
        pod("Pending", node="one", weights={"running": {}}),
        pod("Running", node="one", weights=ended, tuner={"running": {}}),
        pod("Succeeded", node="one", weights=ended, tuner=ended),
    )
    assert follow(server) == {"event": "completed"}
    assert server.asked["follow weights"] == server.asked["follow tuner"] == 1
    assert server.asked["watch Pod"] == 2  # to the end of the program, and to the end of its pod


def test_who_has_waited_long_for_a_gpu_has_all_patience_left_for_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, *[500.0] * 100])
    monkeypatch.setattr(following.time, "monotonic", lambda: next(now))
    failing = {"waiting": {"reason": "ErrImagePull", "message": "connection refused"}}
    waits = pod("Pending")
    hiccup = pod("Pending", node="one", weights=failing)
    works = pod("Succeeded", node="one", weights={"terminated": {"exitCode": 0}}, tuner={"terminated": {"exitCode": 0}})
    assert follow(Counting(waits, hiccup, works))["event"] == "completed"


def test_an_image_that_cannot_be_pulled_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(0, 100000, 30))
    monkeypatch.setattr(following.time, "monotonic", lambda: float(next(moments)))
    failing = {"waiting": {"reason": "ErrImagePull", "message": "connection refused"}}
    with pytest.raises(ImagePullError):
        follow(Counting(*[pod("Pending", node="one", weights=failing)] * 5))


def test_a_secret_is_read_once_for_the_steps_before_a_training_and_anew_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Counting(secrets=("push",))
    platform = KubernetesPlatform(Settings(platform="kubernetes"), cluster=cast(Cluster, server))
    platform.check_secrets(["push"])
    platform.repository("registry.example/data:1", ["push"])
    assert server.asked["get Secret"] == 1
    later = kubernetes.time.monotonic() + kubernetes.SECRET_SECONDS
    monkeypatch.setattr(kubernetes.time, "monotonic", lambda: later)
    platform.repository("registry.example/data:1", ["push"])
    assert server.asked["get Secret"] == 2


def test_a_secret_that_is_not_there_is_looked_for_each_time() -> None:
    server = Counting()
    platform = KubernetesPlatform(Settings(platform="kubernetes"), cluster=cast(Cluster, server))
    for tries in (1, 2):
        with pytest.raises(InputError, match="none of this name"):
            platform.check_secrets(["push"])
        assert server.asked["get Secret"] == tries
