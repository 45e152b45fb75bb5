"""Following a job's pods to the end: what they wait for, what they say, how they ended.

    waiting, and why ─► what the container `weights` says ─► what the program's container says ─► the Job's end
       ▲                                                                                          │
       └────────── evicted, preempted, killed: the Job makes another pod, which goes on ◄─────────┘

Everything is read from the cluster, so whoever comes later can follow as well as who started the job. Where a job has
several nodes, the pod that talks may wait for another that never starts: its log is followed in a thread then, and the
pods are watched.
"""

from __future__ import annotations

import contextvars
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from kaito_flows.cluster.diagnosis import diagnose, diagnose_job, pending_reason
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.logs import LogLine
from kaito_flows.errors import DeadlineError, ImagePullError, InputError, JobError, KaitoFlowsError, KilledError
from kaito_flows.platforms.base import Event
from kaito_flows.platforms.pods import JOB_LABEL, RANK_LABEL, placed

Object = dict[str, Any]

ROUND_SECONDS = 30.0
"""How long a watch of the pods lasts before the Job itself is looked at again."""
# What another workload's end cures: waiting for it is no fault, and the Job's own deadline bounds it.
_QUEUE, _QUOTA = "Insufficient", "exceeded quota"
# A Secret may come a moment after the Workspace, and a registry may hiccup.
_CONFIG_SECONDS = 30.0
_PULL_SECONDS = 60.0
# A node that is rebooted comes back within a minute or two; its pods are given up as soon.
_NODE_SECONDS = 60.0
_EVENTS_AFTER_SECONDS = 10.0


def patience_with(error: KaitoFlowsError, pending_seconds: float) -> float:
    """For how many seconds a pod may suffer from that; never for longer than `pending_seconds`."""
    usual = {ImagePullError: _PULL_SECONDS, InputError: _CONFIG_SECONDS}.get(type(error), pending_seconds)
    return min(usual, pending_seconds)


class JobFollower:
    """Follows one job (one Kubernetes Job for each of its nodes; the first one's pod is the one that talks).

    `jobs` are the Jobs' names and UIDs: one that gets such a name later is another run's.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        jobs: Mapping[str, str],
        program: str,
        on_event: Callable[[Event], None],
        *,
        pending_seconds: float,
    ) -> None:
        self._cluster, self._name, self._jobs, self._uids = cluster, name, list(jobs), set(jobs.values())
        self._program = program
        self._tell, self._pending_seconds = on_event, pending_seconds
        self._telling = threading.Lock()
        self._is_over = False
        # By the pod's UID: the logs that are followed in threads.
        self._listening: dict[str, list[Future[None]]] = defaultdict(list)
        self._told_waiting = ""
        self._pending_since: dict[str, float] = {}
        self._followed: set[tuple[str, str]] = set()
        self._ended: set[str] = set()
        self._pinned: tuple[str, ...] = ()
        self._last: Event = {}
        self._log: list[str] = []

    def follow(self, check: Callable[[], None]) -> Event:
        """Return the job's last event when it has ended well; `check` is called when the job is gone.

        Raises:
            KaitoFlowsError: what became of it.
        """
        try:
            return self._follow(check)
        finally:
            self._is_over = True

    def _follow(self, check: Callable[[], None]) -> Event:
        while True:
            jobs = [self._cluster.get("Job", name) for name in self._jobs]
            if any(job is None or job["metadata"]["uid"] not in self._uids for job in jobs):
                check()
                raise KilledError("the Job was deleted", place=f"Job/{self._jobs[0]}", code="job-deleted")
            first, *_ = found = [job for job in jobs if job is not None]
            if _ended(first, "Complete"):
                pods = self._pods()
                for pod in pods:
                    self._hear_out(pod)  # what it said while nobody listened
                return self._last if self._last.get("event") == "completed" else _completed(pods)
            if any(_ended(job, "Failed") for job in found):
                raise self._failure(next(job for job in found if _ended(job, "Failed")))
            self._pinned = placed(first)
            present: set[str] = set()
            for kind, pod in self._cluster.watch("Pod", labels={JOB_LABEL: self._name}, timeout_seconds=ROUND_SECONDS):
                if not self._is_own(pod):
                    continue
                present.update(owner["uid"] for owner in pod["metadata"]["ownerReferences"])
                self._fail_if_unheard()
                if kind == "DELETED" or self._see(pod):
                    break
            self._fail_if_unheard()
            for job in found:
                if (uid := job["metadata"]["uid"]) in present:
                    self._pending_since.pop(uid, None)
                else:
                    self._see_absent(job)

    def _see(self, pod: Object) -> bool:
        """Do what a pod's state asks for; return whether the Job itself is to be looked at."""
        status = pod.get("status", {})
        phase = status.get("phase")
        if phase in ("Succeeded", "Failed"):
            return self._see_ended(pod, failed=phase == "Failed")
        if phase == "Pending":
            if "deletionTimestamp" in pod["metadata"]:
                return False
            self._see_pending(pod)
        return self._hear(pod)

    def _see_ended(self, pod: Object, *, failed: bool) -> bool:
        if pod["metadata"]["uid"] in self._ended:
            return False
        self._hear_out(pod)
        self._ended.add(pod["metadata"]["uid"])
        if failed:
            error = self._diagnosis(pod)
            if not error.retryable:
                raise error
            self._on_event({"event": "stage", "name": f"{error.code}: waiting for another pod"})
            return False
        for _, job in self._cluster.watch("Job", name=self._jobs[0], timeout_seconds=ROUND_SECONDS):
            if _ended(job, "Complete") or _ended(job, "Failed"):
                break
        return True

    def _see_absent(self, job: Object) -> None:
        """Tell why the Job has no pod: what its controller is not allowed to make stands in the Job's Events alone."""
        since = self._pending_since.setdefault(job["metadata"]["uid"], time.monotonic())
        *_, newest = self._cluster.events(job) or [{}]
        if newest.get("reason") != "FailedCreate":
            return
        said = newest["message"].removeprefix("Error creating: ")
        self._tell_waiting(said)
        if _QUOTA not in said and time.monotonic() - since > min(_CONFIG_SECONDS, self._pending_seconds):
            hint = "the namespace's rules (LimitRange, pod security, admission) refuse it: kubectl describe namespace"
            place = f"Job/{job['metadata']['name']}"
            raise InputError(f"its pod cannot be made: {said}", place=place, hint=hint, code="pod-refused")

    def _tell_waiting(self, reason: str) -> None:
        if reason and reason != self._told_waiting:
            self._told_waiting = reason
            self._on_event({"event": "stage", "name": f"waiting: {reason}"})

    def _see_pending(self, pod: Object) -> None:
        # Counted anew once it has a node: for that it may have waited for hours.
        waits = f"{pod['metadata']['uid']} {pod['spec'].get('nodeName', '')}"
        since = self._pending_since.setdefault(waits, time.monotonic())
        # What the kubelet says of mounts stands in events alone; they cost a request, so the first look is without.
        events = self._cluster.events(pod) if time.monotonic() - since > _EVENTS_AFTER_SECONDS else ()
        self._tell_waiting(pending_reason(pod, events))
        error = diagnose(pod, events, waited=True)
        if error is not None and error.code == "unschedulable" and time.monotonic() - since > _NODE_SECONDS:
            self._fail_if_nodes_gone(pod)
        if error is None or (error.code == "unschedulable" and _QUEUE in error.message):
            return
        if time.monotonic() - since > patience_with(error, self._pending_seconds):
            raise error

    def _fail_if_nodes_gone(self, pod: Object) -> None:
        if self._pinned and set(self._pinned).isdisjoint(ready_hosts(self._cluster)):
            raise KilledError(
                f"{', '.join(self._pinned)}: gone, or not Ready",
                place=f"Pod/{pod['metadata']['name']}",
                hint="it goes on from its last checkpoint on another node, if there is one",
                code="node-lost",
            )

    def _hear(self, pod: Object) -> bool:
        """Follow what the pod's containers say to its end; return whether the program ran, so that there is news.

        Of several pods, it is not waited for.
        """
        if pod["metadata"]["labels"].get(RANK_LABEL, "0") != "0":
            return False
        heard = False
        for container in ("weights", self._program):
            key = (pod["metadata"]["uid"], container)
            if key not in self._followed and _has_run(pod, container):
                if len(self._jobs) > 1:
                    self._listen(*key, pod["metadata"]["name"])
                else:
                    self._cluster.follow_logs(pod["metadata"]["name"], container, on_line=self._on_line)
                    heard = container == self._program
                self._followed.add(key)
        return heard

    def _listen(self, uid: str, container: str, pod: str) -> None:
        """Follow a log in a thread, which ends with the pod."""
        heard: Future[None] = Future()

        def listen() -> None:
            try:
                self._cluster.follow_logs(pod, container, on_line=self._on_line)
            except BaseException as exc:  # noqa: BLE001 - it is raised where it is waited for
                heard.set_exception(exc)
            else:
                heard.set_result(None)

        threading.Thread(target=contextvars.copy_context().run, args=(listen,), daemon=True, name=f"log {pod}").start()
        self._listening[uid].append(heard)

    def _hear_out(self, pod: Object) -> None:
        """Hear what a pod that has ended has said, to the last line."""
        self._hear(pod)
        for heard in self._listening.pop(pod["metadata"]["uid"], ()):
            heard.result()

    def _fail_if_unheard(self) -> None:
        """Raise what went wrong in a thread."""
        for heard in [heard for several in self._listening.values() for heard in several if heard.done()]:
            heard.result()

    def _on_event(self, event: Event) -> None:
        with self._telling:
            self._tell(event)

    def _on_line(self, line: LogLine) -> None:
        if self._is_over:
            raise EOFError("nobody listens any more")
        try:
            event = json.loads(line.text)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            self._last = event
            self._on_event(event)
        elif line.text.strip():
            self._log = [*self._log[-19:], line.text.rstrip()]

    def _failure(self, job: Object) -> KaitoFlowsError:
        told = diagnose_job(job)
        if isinstance(told, DeadlineError):
            return told
        failed = [pod for pod in self._pods() if pod.get("status", {}).get("phase") == "Failed"]
        return self._diagnosis(failed[-1]) if failed else told or JobError("failed", place=f"Job/{self._name}")

    def _diagnosis(self, pod: Object) -> KaitoFlowsError:
        error = diagnose(pod, self._cluster.events(pod), log_tail="\n".join(self._log[-5:]))
        return error or KilledError("the pod ended without a word", place=f"Pod/{pod['metadata']['name']}")

    def _pods(self) -> list[Object]:
        pods = [pod for pod in self._cluster.list("Pod", labels={JOB_LABEL: self._name}) if self._is_own(pod)]
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def _is_own(self, pod: Object) -> bool:
        """Whether it is of these Jobs: pods of one that had the name before may take their time to go."""
        references = pod["metadata"].get("ownerReferences", ())
        return any(reference["uid"] in self._uids for reference in references)


def _completed(pods: list[Object]) -> Event:
    """The last event as the termination message has it, where no log does."""
    for pod in reversed(pods):
        for container in pod.get("status", {}).get("containerStatuses", ()):
            said = container.get("state", {}).get("terminated", {}).get("message", "")
            try:
                event = json.loads(said.strip().splitlines()[-1]) if said.strip() else {}
            except ValueError:
                event = {}
            if isinstance(event, dict) and event.get("event") == "completed":
                return event
    return {"event": "completed"}


def ready_hosts(cluster: Cluster) -> set[str]:
    """The host names, by which pods are pinned, of the nodes that are Ready."""
    return {
        node["metadata"].get("labels", {}).get("kubernetes.io/hostname", node["metadata"]["name"])
        for node in cluster.list("Node")
        if any(c["type"] == "Ready" and c["status"] == "True" for c in node.get("status", {}).get("conditions", ()))
    }


def _ended(job: Object, how: str) -> bool:
    return any(c["type"] == how and c["status"] == "True" for c in job.get("status", {}).get("conditions", ()))


def _state(pod: Object, container: str) -> Object:
    status = pod.get("status", {})
    for one in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if one["name"] == container:
            found: Object = one.get("state", {})
            return found
    return {}


def _has_run(pod: Object, container: str) -> bool:
    return not {"running", "terminated"}.isdisjoint(_state(pod, container))
