"""A job of two pods is followed: what the first says is heard while the other is watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import ImagePullError, RunError
from kaito_flows.platforms import Event, following
from kaito_flows.platforms.following import JobFollower
from kaito_flows.platforms.pods import JOB_LABEL, RANK_LABEL

pytestmark = pytest.mark.cluster

NAMESPACE = "following"
NO_IMAGE = "127.0.0.1:1/none:1"
LISTENER: ContextVar[str] = ContextVar("listener", default="nobody")


def pair(space: Cluster, name: str, busybox: str, first: str, second_image: str = "") -> dict[str, str]:
    """Make a job of two pods, of which the first runs a line of shell; return its Jobs' names and UIDs."""
    made = {}
    for rank, image in enumerate((busybox, second_image or busybox)):
        labels = {JOB_LABEL: name, RANK_LABEL: str(rank)}
        command = ["sh", "-c", first if rank == 0 else "true"]
        container = {"name": "tuner", "image": image, "command": command, "imagePullPolicy": "IfNotPresent"}
        pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]}
        template = {"metadata": {"labels": labels}, "spec": pod}
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{name}-{rank}", "labels": labels},
            "spec": {"backoffLimit": 0, "template": template},
        }
        made[f"{name}-{rank}"] = space.create(job)["metadata"]["uid"]
    return made


def follow(space: Cluster, name: str, jobs: dict[str, str], on_event: Callable[[Event], None]) -> Event:
    follower = JobFollower(space, name, jobs, "tuner", on_event, pending_seconds=60)

    def gone() -> None:
        raise AssertionError("the Jobs are gone")

    return follower.follow(gone)


def test_a_pod_that_cannot_start_is_told_while_the_other_waits_for_it(
    space: Cluster, busybox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_PULL_SECONDS", 3)
    says = """echo '{"event": "stage", "name": "waiting for the others"}'; sleep 600"""
    jobs = pair(space, "half", busybox, says, NO_IMAGE)
    told: list[tuple[str, Any]] = []
    LISTENER.set("the run")
    start = time.monotonic()
    with pytest.raises(ImagePullError) as failed:
        follow(space, "half", jobs, lambda event: told.append((LISTENER.get(), event["name"])))
    assert time.monotonic() - start < 45
    assert NO_IMAGE in failed.value.message
    assert "half-1" in failed.value.place
    assert ("the run", "waiting for the others") in told, "who listens is the same, whichever thread tells"
    # What is still said is nobody's business any more.
    for name in jobs:
        space.delete("Job", name)


def test_both_pods_end_and_every_word_was_heard(space: Cluster, busybox: str) -> None:
    says = """for i in 1 2 3; do echo "{\\"event\\": \\"step\\", \\"step\\": $i}"; sleep 1; done"""
    jobs = pair(space, "whole", busybox, f"""{says}; echo '{{"event": "completed", "loss": 1}}'""")
    told: list[Event] = []
    assert follow(space, "whole", jobs, told.append) == {"event": "completed", "loss": 1}
    said = [event for event in told if event["event"] != "stage"]
    assert said == [*({"event": "step", "step": i} for i in (1, 2, 3)), {"event": "completed", "loss": 1}]


def test_what_goes_wrong_with_what_was_heard_ends_the_run(
    space: Cluster, busybox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "ROUND_SECONDS", 2)
    jobs = pair(space, "wrong", busybox, """echo '{"event": "step"}'; sleep 600""")

    def on_event(event: Event) -> None:
        if event["event"] == "step":
            raise RunError("cannot be used", place="step")

    with pytest.raises(RunError, match="cannot be used"):
        follow(space, "wrong", jobs, on_event)
    for name in jobs:
        space.delete("Job", name)
