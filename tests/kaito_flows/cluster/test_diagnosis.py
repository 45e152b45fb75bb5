"""What is wrong with a pod: from pods as real clusters describe them, and from real pods."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.cluster.diagnosis import diagnose, diagnose_job, failed_container, pending_reason
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import (
    DatasetError,
    DeadlineError,
    ImagePullError,
    InputError,
    JobError,
    KaitoFlowsError,
    KilledError,
    OutOfMemoryError,
    PreemptedError,
    SchedulingError,
)

NAMESPACE = "gateway-diagnosis"
# What a Kubernetes 1.20 with containerd said of pods that failed in these ways.
CAPTURED: dict[str, Any] = json.loads(Path(__file__).with_name("pods.json").read_text())

Make = Callable[..., dict[str, Any]]
FAILED = {"event": "failed", "code": "invalid-dataset", "place": "rows.jsonl:3", "message": "no messages", "hint": "h"}


def captured(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = copy.deepcopy(CAPTURED[name])
    return found["pod"], found["events"]


def ended(exit_code: int, message: str = "", reason: str = "Error", **status: Any) -> dict[str, Any]:
    """A pod whose one container has ended."""
    terminated = {"exitCode": exit_code, "reason": reason, **({"message": message} if message else {})}
    return {
        "metadata": {"name": "p", "namespace": "team-a"},
        "spec": {"nodeName": "node-1", "containers": [{"name": "tuner", "image": "i"}], "restartPolicy": "Never"},
        "status": {
            "phase": "Failed",
            "containerStatuses": [{"name": "tuner", "state": {"terminated": terminated}}],
            **status,
        },
    }


@pytest.mark.parametrize(
    ("name", "cls", "line"),
    [
        ("oom", OutOfMemoryError, r"container tuner: the container took more than its 16Mi of memory"),
        ("oom-child", OutOfMemoryError, r"more than its 16Mi"),
        (
            "badtag",
            ImagePullError,
            r"127.0.0.1:1/nothing:here: .*connection refused \(127.0.0.1:1 cannot be reached from",
        ),
        ("badname", ImagePullError, r"must be lowercase \(correct the image's name\)"),
        ("init-pull", ImagePullError, r"init container fetch: 127.0.0.1:1/nothing:here"),
        (
            "secret-env",
            InputError,
            r"^secret-not-found: Pod team-a/secret-env, container tuner: .*secret \"hf\" not found",
        ),
        ("secret-volume", InputError, r"^secret-not-found: .*secret \"nosuch\" not found"),
        ("cm-env", InputError, r"^config-map-not-found: .*couldn't find key nokey in ConfigMap team-a/cm"),
        ("cm-volume", InputError, r"^config-map-not-found: .*configmap \"nosuchcm\" not found"),
        ("cm-key-volume", InputError, r"^config-map-not-found: .*non-existent config key: nokey"),
        ("root", InputError, r"^invalid-container: .*runAsNonRoot and image will run as root"),
        ("deadline", DeadlineError, r"stopped after 3 s"),
        ("evict", KilledError, r"^evicted: .*from node node-1: Usage of EmptyDir volume .*more to the node's disk"),
        ("init", JobError, r"init container fetch: ended with exit code 7: fetching \| boom .*logs init -c fetch"),
        ("plain", JobError, r"container tuner: ended with exit code 4: fetching \| boom"),
        ("start", JobError, r"^container-not-started: .*exec: \"/no/such/program\": .*no such file"),
        ("said", DatasetError, r"^invalid-dataset: rows.jsonl:3: no messages \(name the columns\)$"),
    ],
)
def test_a_pod_that_failed_is_told_by_its_cause(name: str, cls: type[KaitoFlowsError], line: str) -> None:
    pod, events = captured(name)
    error = diagnose(pod, events, log_tail="fetching\nboom\n")
    assert type(error) is cls
    assert re.search(line, str(error)), str(error)
    assert error.hint


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unsched", r"0/1 nodes are available: 1 Insufficient nvidia.com/gpu. \(wait until something else ends"),
        ("selector", r"didn't match Pod's node affinity. \(no node has the labels"),
        ("pvc", r"persistentvolumeclaim \"nopvc\" not found. \(create the PersistentVolumeClaim"),
    ],
)
def test_a_pod_without_a_node_is_no_failure_until_it_was_waited_for(name: str, line: str) -> None:
    pod, events = captured(name)
    assert diagnose(pod, events) is None
    error = diagnose(pod, events, waited=True)
    assert type(error) is SchedulingError
    assert re.search(line, str(error)), str(error)
    assert pending_reason(pod, events) == error.message


def test_nothing_is_wrong_with_a_pod_that_succeeded_or_runs() -> None:
    pod, events = captured("ok")
    assert diagnose(pod, events, waited=True) is None
    assert pending_reason(pod, events) == ""
    pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "tuner", "state": {"running": {}}}]}
    assert diagnose(pod, waited=True) is None


def test_what_a_pod_waits_for_is_told_in_the_kubelets_words() -> None:
    assert "connection refused" in pending_reason(*captured("badtag"))
    assert 'secret "nosuch" not found' in pending_reason(*captured("secret-volume"))
    pod = ended(0)
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "tuner", "state": {"waiting": {}}}]}
    pulling = {"reason": "Pulling", "message": 'Pulling image "big:1"'}
    assert pending_reason(pod, [pulling]) == 'Pulling image "big:1"'
    assert pending_reason(pod, [pulling, {"reason": "Pulled"}]) == "tuner is being created on node-1"
    del pod["spec"]["nodeName"]
    assert pending_reason(pod) == "waits for a node"


def test_a_volume_that_was_found_in_the_end_is_no_longer_missing() -> None:
    pod, events = captured("secret-volume")
    pulling = {"reason": "Pulling", "message": 'Pulling image "big:1"'}
    assert diagnose(pod, [*events, pulling]) is None
    assert pending_reason(pod, [*events, pulling]) == 'Pulling image "big:1"'


def test_our_own_programs_word_is_taken_from_the_log_where_the_message_is_lost() -> None:
    log = f"noise\n{json.dumps(FAILED)}\nmore noise\n"
    assert type(diagnose(ended(11), log_tail=log)) is DatasetError
    assert type(diagnose(ended(11, json.dumps(FAILED)), log_tail="noise")) is DatasetError
    assert type(diagnose(ended(11), log_tail="noise")) is JobError


def test_a_child_that_was_killed_for_memory_is_out_of_memory_whatever_its_parent_says() -> None:
    vague = json.dumps({**FAILED, "code": "job-failed", "message": "a worker died"})
    assert type(diagnose(ended(1, vague, "OOMKilled"))) is OutOfMemoryError
    assert type(diagnose(ended(11, json.dumps(FAILED), "OOMKilled"))) is DatasetError


def test_a_checkpoint_that_was_saved_on_an_eviction_is_not_forgotten() -> None:
    saved = json.dumps({**FAILED, "code": "preempted", "message": "saved at step 40"})
    pod = ended(143, saved, reason="Error")
    pod["status"]["reason"] = "Evicted"
    assert type(diagnose(pod)) is PreemptedError


def test_a_deadline_is_no_preemption() -> None:
    saved = json.dumps({**FAILED, "code": "preempted", "message": "saved at step 40"})
    pod = ended(143, saved)
    pod["status"]["reason"] = "DeadlineExceeded"
    error = diagnose(pod)
    assert type(error) is DeadlineError
    assert not error.retryable


@pytest.mark.parametrize(
    ("status", "events", "code"),
    [
        ({"reason": "Evicted", "message": "The node was low on resource: memory."}, [], "evicted"),
        (
            {"reason": "Terminated", "message": "Pod was terminated in response to imminent node shutdown."},
            [],
            "evicted",
        ),
        ({"reason": "NodeShutdown", "message": "Node is shutting down"}, [], "evicted"),
        ({}, [{"reason": "Preempted", "message": "Preempted by default/important on node node-1"}], "evicted"),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            [],
            "evicted",
        ),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]},
            [],
            "node-lost",
        ),
        ({"reason": "NodeLost", "message": "Node node-1 which was running pod p is unresponsive"}, [], "node-lost"),
        ({"reason": "OutOfnvidia.com/gpu", "message": "Node didn't have enough resource"}, [], "node-refused"),
        ({"reason": "NodeAffinity", "message": "Predicate NodeAffinity failed"}, [], "node-refused"),
        ({"reason": "UnexpectedAdmissionError", "message": "Allocate failed"}, [], "node-refused"),
        ({}, [], "job-killed"),
    ],
)
def test_who_stopped_a_pod_is_told_and_it_may_go_on(
    status: dict[str, Any], events: list[dict[str, Any]], code: str
) -> None:
    error = diagnose(ended(137, reason="Error") | {"status": {**ended(137)["status"], **status}}, events)
    assert isinstance(error, KilledError)
    assert error.code == code
    assert error.retryable
    assert error.hint


def test_a_pod_that_is_taken_away_is_told_with_why() -> None:
    pod = ended(0)
    pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "tuner", "state": {"running": {}}}]}
    not_ready = [{"reason": "NodeNotReady", "message": "Node is not ready"}]
    assert diagnose(pod, not_ready) is None
    waited = diagnose(pod, not_ready, waited=True)
    assert waited is not None
    assert waited.code == "node-lost"
    pod["metadata"]["deletionTimestamp"] = "2026-11-25T17:00:00Z"
    for events, code in ((not_ready, "node-lost"), ([], "pod-deleted")):
        error = diagnose(pod, events)
        assert error is not None
        assert (error.code, error.retryable) == (code, True)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("401 Unauthorized", r"Secret with credentials for registry.example:5000; the pod has: pull"),
        ("pull access denied, insufficient_scope: authorization failed", r"Secret with credentials"),
        ("registry.example:5000/a:b: not found", r"check name and tag"),
        ("dial tcp: lookup registry.example: no such host", r"cannot be reached from node node-1"),
        ("no match for platform in manifest: not found", r"not built for the node's processor"),
        ("x509: certificate signed by unknown authority", r"does not trust the certificate"),
        ("something new", r"see whether node node-1 can pull it from registry.example:5000"),
    ],
)
def test_an_image_that_cannot_be_pulled_has_a_hint_that_fits(said: str, hint: str) -> None:
    pod = ended(0)
    pod["spec"] |= {"containers": [{"name": "tuner", "image": "registry.example:5000/a:b"}]}
    pod["spec"]["imagePullSecrets"] = [{"name": "pull"}]
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry.example:5000/a:b"'}
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "tuner", "state": {"waiting": waiting}}]}
    message = f'Failed to pull image "registry.example:5000/a:b": rpc error: code = Unknown desc = {said}'
    error = diagnose(pod, [{"reason": "Failed", "message": message}, {"reason": "Failed", "message": "Error: x"}])
    assert type(error) is ImagePullError
    assert said in error.message
    assert "rpc error" not in error.message
    assert re.search(hint, error.hint), error.hint


def test_a_crash_loop_is_told_by_its_last_crash() -> None:
    pod = ended(0)
    last = {"terminated": {"exitCode": 11, "reason": "Error", "message": json.dumps(FAILED)}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    pod["status"] = {
        "phase": "Running",
        "containerStatuses": [{"name": "tuner", "state": waiting, "lastState": last}],
    }
    assert type(diagnose(pod)) is DatasetError
    last["terminated"]["message"] = ""
    assert "exit code 11: the last words" in str(diagnose(pod, log_tail="the last words"))


def test_the_container_that_failed_is_named() -> None:
    assert failed_container(captured("init")[0]) == "fetch"
    assert failed_container(captured("plain")[0]) == "tuner"
    assert failed_container(captured("ok")[0]) == ""


def test_a_job_whose_pods_are_gone_tells_itself_why() -> None:
    job: dict[str, Any] = {
        "metadata": {"name": "j", "namespace": "n"},
        "spec": {"activeDeadlineSeconds": 60},
        "status": {},
    }
    assert diagnose_job(job) is None
    condition = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "Job was active too long"}
    job["status"]["conditions"] = [condition]
    assert re.match(r"deadline-exceeded: Job n/j: it was stopped after 60 s", str(diagnose_job(job)))
    condition |= {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
    assert type(diagnose_job(job)) is JobError


GPUS = {"limits": {"nvidia.com/gpu": "99"}}
TOKEN = [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "no-secret", "key": "HF_TOKEN"}}}]
VOLUME = {"volumes": [{"name": "v", "secret": {"secretName": "no-volume"}}]}
MOUNT = [{"name": "v", "mountPath": "/v"}]
TELLS = f"echo '{json.dumps(FAILED)}' >/dev/termination-log; exit 11"


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "script", "more", "cls", "code"),
    [
        ("oom", "tail /dev/zero", {"resources": {"limits": {"memory": "16Mi"}}}, OutOfMemoryError, "out-of-memory"),
        ("pull", "", {"image": "127.0.0.1:1/nothing:here"}, ImagePullError, "image-pull-failed"),
        ("gpus", "true", {"resources": GPUS}, SchedulingError, "unschedulable"),
        ("secret", "true", {"env": TOKEN}, InputError, "secret-not-found"),
        ("volume", "true", {"spec": VOLUME, "volumeMounts": MOUNT}, InputError, "secret-not-found"),
        ("deadline", "sleep 60", {"spec": {"activeDeadlineSeconds": 2}}, DeadlineError, "deadline-exceeded"),
        ("program", "", {"command": ["/no/such"]}, JobError, "container-not-started"),
        ("tells", TELLS, {}, DatasetError, "invalid-dataset"),
        ("silent", "echo last words; exit 4", {}, JobError, "job-failed"),
    ],
)
def test_a_real_pod_that_fails_is_told_by_its_cause(
    space: Cluster, make_pod: Make, name: str, script: str, more: dict[str, Any], cls: type, code: str
) -> None:
    pod = space.create(make_pod(name, script, **more))
    deadline = time.monotonic() + 60
    error = None
    while error is None and time.monotonic() < deadline:
        for _, pod in space.watch("Pod", name=name, timeout_seconds=2):
            tail = space.read_logs(name) if failed_container(pod) else ""
            error = diagnose(pod, space.events(pod), log_tail=tail, waited=True)
            if error is not None:
                break
    assert type(error) is cls, (error, pod["status"])
    assert error.code == code
    assert error.hint
    if name == "silent":
        assert "exit code 4: last words" in error.message
