"""What is wrong with a pod, from what the API server knows of it: which error, in whose words, and what to do.

Nothing here asks the API server anything. The order matters: who stopped the pod (a deadline, an eviction, a lost node)
says more than how its containers took it, and what our own program wrote before it ended says more than its exit code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kaito_flows.cluster.pending import (
    START_REASONS,
    mount_error,
    pending_reason,
    scheduling_error,
    start_error,
    waiting_error,
)
from kaito_flows.cluster.pods import Container, condition_of, containers_of, failed_container, node_of, pod_place
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import (
    DeadlineError,
    JobError,
    KaitoFlowsError,
    KilledError,
    OutOfMemoryError,
    from_job_exit,
)

__all__ = ["diagnose", "diagnose_job", "failed_container", "pending_reason"]

_EVICTED_REASONS = frozenset({"Evicted", "NodeShutdown", "Shutdown", "Terminated", "Preempting", "Preempted"})
# `DisruptionTarget` conditions of newer clusters, events of all of them.
_EVICTED_DISRUPTIONS = frozenset({"EvictionByEvictionAPI", "PreemptionByScheduler", "TerminationByKubelet"})
_LOST_DISRUPTIONS = frozenset({"DeletionByTaintManager", "DeletionByPodGC"})
_LOST_EVENTS = frozenset({"TaintManagerEviction", "NodeNotReady", "NodeControllerEviction"})
_REFUSED_REASONS = frozenset({"UnexpectedAdmissionError", "NodeAffinity", "NodePorts"})
_LOG_LINES = 3


def diagnose(
    pod: Object, events: Sequence[Object] = (), *, log_tail: str = "", waited: bool = False
) -> KaitoFlowsError | None:
    """Return the error that a pod has come to, or None when nothing is wrong with it, or not yet.

    A pod that has not ended can still recover from an image that cannot be pulled, or from a Secret that is not there:
    the caller decides for how long. With `waited`, the caller has waited long enough for a node, and for one that no
    longer answers.
    """
    status = pod.get("status", {})
    if status.get("phase") == "Succeeded":
        return None
    containers = list(containers_of(pod))
    return (
        _stopped_by_deadline(pod)
        or _said_by_itself(pod, containers, log_tail)
        or _disrupted(pod, events)
        or _refused_by_node(pod)
        or next(filter(None, (waiting_error(pod, item, events) for item in containers)), None)
        or next(filter(None, (_ended(pod, item, log_tail) for item in containers)), None)
        or mount_error(pod, events)
        or _lost(pod, events, waited)
        or (scheduling_error(pod) if waited else None)
    )


def diagnose_job(job: Object) -> KaitoFlowsError | None:
    """Return the error that a Job's own conditions tell, for a Job whose pods are gone; None unless it has failed."""
    meta = job["metadata"]
    place = f"Job {meta.get('namespace', '')}/{meta['name']}"
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == "Failed" and condition["status"] == "True":
            message = condition.get("message") or condition.get("reason") or "failed"
            if condition.get("reason") == "DeadlineExceeded":
                seconds = job["spec"].get("activeDeadlineSeconds")
                return _deadline(place, seconds)
            return JobError(message, place=place, hint=f"kubectl describe job {meta['name']}")
    return None


def _deadline(place: str, seconds: Any) -> DeadlineError:
    return DeadlineError(
        f"it was stopped after {seconds} s, which is all it may take" if seconds else "it took longer than it may",
        place=place,
        hint="allow more time, or fewer steps; it goes on from its last checkpoint when it is run again",
    )


def _stopped_by_deadline(pod: Object) -> KaitoFlowsError | None:
    if pod["status"].get("reason") != "DeadlineExceeded":
        return None
    return _deadline(pod_place(pod), pod["spec"].get("activeDeadlineSeconds"))


def _said_by_itself(pod: Object, containers: Sequence[Container], log_tail: str) -> KaitoFlowsError | None:
    """Return what our program wrote about its failure: as termination message, else as one of its last lines."""
    for item in containers:
        terminated = item.state.get("terminated") or item.last_state.get("terminated") or {}
        code = terminated.get("exitCode", 0)
        if code == 0:
            continue
        alone = len(containers) == 1
        said = _failed_event(terminated.get("message", "")) or (_failed_event(log_tail) if alone else None)
        if said is None:
            return None
        error = from_job_exit(
            code,
            said["message"],
            code=said["code"],
            place=said.get("place") or item.place(pod),
            hint=said.get("hint", ""),
        )
        # A program whose child the kernel killed for memory knows only that it is gone.
        vague = type(error) in (JobError, KilledError) and terminated.get("reason") == "OOMKilled"
        return None if vague else error
    return None


def _failed_event(text: str) -> dict[str, str] | None:
    for line in reversed(text.splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "failed" and event.get("message"):
            return {key: str(event.get(key) or "") for key in ("code", "place", "message", "hint")}
    return None


def _disrupted(pod: Object, events: Sequence[Object]) -> KaitoFlowsError | None:
    status, place = pod["status"], pod_place(pod)
    target = condition_of(pod, "DisruptionTarget")
    disruption = target.get("reason", "") if target.get("status") == "True" else ""
    preempted = next((event for event in events if event.get("reason") == "Preempted"), None)
    if status.get("reason") == "NodeLost" or disruption in _LOST_DISRUPTIONS:
        return _node_lost(pod, target.get("message") or status.get("message") or "")
    if status.get("reason") in _EVICTED_REASONS or disruption in _EVICTED_DISRUPTIONS or preempted:
        said = status.get("message") or target.get("message") or (preempted or {}).get("message") or "evicted"
        hint = "it goes on from its last checkpoint; requests for memory and disk, or a priority class, make it rarer"
        if 'EmptyDir volume "' in said or "ephemeral" in said:
            hint = "it wrote more to the node's disk than it may: give it more room, or keep fewer checkpoints"
        return KilledError(f"evicted from {node_of(pod)}: {said}", place=place, hint=hint, code="evicted")
    return None


def _node_lost(pod: Object, said: str) -> KilledError:
    return KilledError(
        f"{node_of(pod)} is gone or does not answer{': ' if said else ''}{said}",
        place=pod_place(pod),
        hint="it goes on from its last checkpoint on another node; spot nodes are taken away at any time",
        code="node-lost",
    )


def _lost(pod: Object, events: Sequence[Object], waited: bool) -> KaitoFlowsError | None:
    """Return the error of a pod that was taken away, or whose node does not answer."""
    leaving = "deletionTimestamp" in pod["metadata"]
    unanswered = any(event.get("reason") in _LOST_EVENTS for event in events) or pod["status"].get("phase") == "Unknown"
    if unanswered and (leaving or waited):
        return _node_lost(pod, "")
    if leaving:
        hint = "who deleted it? `kubectl get events` may say; it goes on from its last checkpoint when it is run again"
        return KilledError("the pod was deleted before it ended", place=pod_place(pod), hint=hint, code="pod-deleted")
    return None


def _refused_by_node(pod: Object) -> KaitoFlowsError | None:
    reason = pod["status"].get("reason") or ""
    refused = reason in _REFUSED_REASONS or reason.startswith("OutOf")
    if pod["status"].get("phase") != "Failed" or not refused:
        return None
    said = pod["status"].get("message") or reason
    hint = "the scheduler and the node disagree on what is free there; another try often succeeds"
    return KilledError(f"{node_of(pod)} refused the pod: {said}", place=pod_place(pod), hint=hint, code="node-refused")


def _ended(pod: Object, item: Container, log_tail: str) -> KaitoFlowsError | None:
    crashing = (item.state.get("waiting") or {}).get("reason") == "CrashLoopBackOff"
    terminated = item.state.get("terminated") or (item.last_state.get("terminated") if crashing else None)
    if not terminated or terminated.get("exitCode", 0) == 0:
        return None
    code, reason, place = terminated["exitCode"], terminated.get("reason", ""), item.place(pod)
    if reason == "OOMKilled":
        return _out_of_memory(pod, item, place)
    if reason in START_REASONS:
        return start_error(terminated.get("message") or reason, place)
    said = [line for line in (terminated.get("message") or log_tail).splitlines() if line.strip()][-_LOG_LINES:]
    words = " | ".join(said) or "no word"
    name = pod["metadata"]["name"]
    hint = f"kubectl logs {name} -c {item.name} shows all it wrote"
    if code in (137, 143):
        signal = "SIGKILL" if code == 137 else "SIGTERM"
        return KilledError(f"killed from outside ({signal}): {words}", place=place, hint=hint)
    return JobError(f"ended with exit code {code}: {words}", place=place, hint=hint)


def _out_of_memory(pod: Object, item: Container, place: str) -> OutOfMemoryError:
    spec = pod.get("spec", {})
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if container["name"] == item.name and limit:
            hint = "a smaller batch or shorter rows need less; or raise the limit"
            return OutOfMemoryError(f"the container took more than its {limit} of memory", place=place, hint=hint)
    hint = "a smaller batch or shorter rows need less; or take a node with more memory"
    return OutOfMemoryError(f"{node_of(pod)} ran out of memory", place=place, hint=hint)
