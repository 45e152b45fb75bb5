"""What the watcher writes into a Workspace's status: functions that change a fresh copy of the object in place.

The run writes the same status. Each change is therefore made on the newest object, and is sent with its version: when
somebody was faster, it is made again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from kaito_flows.flows.watching.endings import News
from kaito_flows.workspace.status import WORKSPACE_SUCCEEDED, utc_now

Object = Any
Change = Callable[[Object], None]


def set_condition(status: dict[str, Any], type_: str, value: str, reason: str, message: str, generation: int) -> None:
    """Set a condition in place; its time moves only when its status changes, as Kubernetes has it."""
    conditions = status.setdefault("conditions", [])
    before = next((c for c in conditions if c.get("type") == type_), None)
    moved = before is None or before.get("status") != value
    made = {
        "type": type_,
        "status": value,
        "reason": reason,
        "message": message,
        "lastTransitionTime": utc_now() if moved or before is None else before.get("lastTransitionTime", utc_now()),
        "observedGeneration": generation,
    }
    if before is None:
        conditions.append(made)
    else:
        conditions[conditions.index(before)] = made


def is_settled(body: Mapping[str, Any], generation: int) -> bool:
    """Whether this generation has come to its end, by its status."""
    status = body.get("status") or {}
    return status.get("observedGeneration") == generation and status.get("state") in ("Succeeded", "Ready")


def has_run(body: Mapping[str, Any], generation: int) -> bool:
    """Whether a run is known that works for this generation: the status is then the run's to write."""
    run = (body.get("status") or {}).get("run") or {}
    return bool(run.get("flowRunId")) and run.get("generation") == generation


def awaited_run(body: Mapping[str, Any]) -> str:
    """The run that has not said yet how this generation ended, or ""."""
    status = body.get("status") or {}
    reasons = [c.get("reason") for c in status.get("conditions", ()) if c.get("type") == WORKSPACE_SUCCEEDED]
    if reasons != ["workspacePending"] or not has_run(body, body["metadata"].get("generation", 1)):
        return ""
    return str(status["run"]["flowRunId"])


def changes(change: Change, body: Mapping[str, Any]) -> bool:
    """Whether it makes a difference: Kopf waits for the event of a patch, and a patch without effect has none."""
    made = copy.deepcopy(dict(body))
    change(made)
    return made != dict(body)


def told(reason: str, message: str, generation: int, *, state: str = "Pending") -> Change:
    """The Workspace has not succeeded (yet), for that reason."""

    def change(body: Object) -> None:
        status = body.setdefault("status", {})
        before: dict[str, Any] = next(
            (c for c in status.get("conditions", []) if c.get("type") == WORKSPACE_SUCCEEDED), {}
        )
        said = (before.get("reason"), before.get("message"), before.get("observedGeneration"))
        if said == (reason, message, generation):
            return
        status["state"] = state
        status["observedGeneration"] = generation
        set_condition(status, WORKSPACE_SUCCEEDED, "False", reason, message, generation)

    return change


def queued(flow_run_id: str, generation: int) -> Change:
    """A run is there and will start; what the run says itself is left alone."""

    def change(body: Object) -> None:
        status = body.setdefault("status", {})
        if (status.get("run") or {}).get("flowRunId") == flow_run_id:
            return
        status["run"] = {"flowRunId": flow_run_id, "generation": generation}
        status["state"] = "Pending"
        status["observedGeneration"] = generation
        message = f"flow run {flow_run_id} is queued"
        set_condition(status, WORKSPACE_SUCCEEDED, "False", "workspacePending", message, generation)

    return change


def became(news: News) -> Change:
    """What became of a run that does not say it: of one that runs, its end alone is told."""

    def change(body: Object) -> None:
        if awaited_run(body) != news.flow_run_id:
            return
        status = body["status"]
        if not news.ended and status.get("state") != news.state:
            return
        status["state"] = news.state
        generation = body["metadata"].get("generation", 1)
        set_condition(status, WORKSPACE_SUCCEEDED, "False", news.reason, news.message, generation)

    return change
