"""The status of a Workspace while a run works for it: running, then succeeded, or failed with its cause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.runtime import flow_run as current_run

from kaito_flows.errors import InputError, KaitoFlowsError, RunError
from kaito_flows.nodes import NodeLease
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.platforms import Event, Platform
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.progress import listening, log
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.status import (
    INFERENCE_READY,
    JOB_STARTED,
    RESOURCE_READY,
    WORKSPACE_SUCCEEDED,
    WorkspaceStatus,
    columns,
    reason_of,
    utc_now,
)

INTERVAL_SECONDS = 30.0
"""How often the step and the loss of a training are written."""

MAX_RUNS = 10
"""How often a run is begun, evictions included: the automation that resumes crashed runs knows no limit."""

_ABANDONED = ("workspace-deleted", "workspace-changed")
_OF_A_RUN = ("step", "steps", "loss", "nodes")


@contextmanager
def keeping_status(workspace: Workspace, platform: Platform) -> Iterator[WorkspaceStatus]:
    """Keep the Workspace's status while the block lasts, and say how it ended."""
    before = platform.read_status(workspace.name)
    status = WorkspaceStatus(
        name=workspace.name,
        api_version=workspace.api_version,
        instance_type=workspace.resource.instance_type,
        created=before.created if before else utc_now(),
        generation=workspace.metadata.generation or (before.generation if before else 1),
        state="Running",
        node_count=workspace.resource.count,
        conditions=dict(before.conditions) if before else {},
        facts=dict(before.facts) if before else {},
    )
    if status.facts.get("flow_run_id") != str(current_run.id):
        _forget_last_run(status, platform)
    status.set(WORKSPACE_SUCCEEDED, "False", "workspacePending", "running")
    platform.write_status(status)
    try:
        with listening(_Progress(status, platform)):
            yield status
    except Exception as exc:
        # Bad input is found before a job runs, or by the job itself. After any other failure the job would run for
        # nobody. (A run that is killed never gets here: its job is taken up by the next.)
        code = exc.code if isinstance(exc, KaitoFlowsError) else "unexpected-error"
        if code in _ABANDONED:
            raise  # the status belongs to who comes after
        status.state = "Failed"
        status.set(WORKSPACE_SUCCEEDED, "False", reason_of(code), str(exc) or code)
        # Neither may hide what went wrong first.
        _try(lambda: _finish(status, platform))
        if not isinstance(exc, InputError):
            _try(lambda: platform.stop_jobs(workspace.name))
        raise
    except BaseException:
        # Ctrl-C: the job, if it still runs, is stopped by who pressed it. In a cluster it is a cancellation, of which
        # whoever asked for it tells, or an eviction, after which the run comes again.
        if platform.kind == "local":
            status.state = "Stopped"
            status.set(WORKSPACE_SUCCEEDED, "False", "workspaceStopped", "interrupted")
            _finish(status, platform)
        raise
    status.state = "Succeeded"
    status.set(WORKSPACE_SUCCEEDED, "True", "workspaceSucceeded")
    _finish(status, platform)


def refuse_endless_runs() -> None:
    """Raise if this run was begun so often that it will not come to an end.

    Raises:
        RunError: (code `too-many-crashes`).
    """
    if (current_run.run_count or 1) > MAX_RUNS:
        message = f"was begun {MAX_RUNS} times, and crashed or was evicted each time"
        raise RunError(message, place="run", hint="its logs in Prefect say more", code="too-many-crashes")


def tell_leased(status: WorkspaceStatus, platform: Platform, lease: NodeLease) -> None:
    """Tell which nodes the run has."""
    platform.check_known(status.name)
    status.facts["nodes"] = list(lease.nodes)
    status.set(RESOURCE_READY, "True", "workspaceResourceStatusSuccess", ", ".join(lease.nodes))
    platform.write_status(status)


def tell_cost(status: WorkspaceStatus, cost: NodeCost) -> dict[str, Any]:
    """Tell what the nodes of the run have cost, and return it JSON-ready."""
    facts = status.facts["cost"] = cost.as_dict()
    if cost.usd != 0.0:
        artifacts.show_table("node-cost", cost.rows(), f"What the nodes of {status.name} cost")
    return facts


def tell_stopped(workspace: str, flow_run_id: str, platform: Platform) -> None:
    """Tell that the run was cancelled, unless something else was told of the Workspace since."""
    status = platform.read_status(workspace)
    if status is None or status.facts.get("flow_run_id") != flow_run_id:
        return
    succeeded = status.conditions.get(WORKSPACE_SUCCEEDED)
    if succeeded is not None and succeeded.reason == "workspacePending":
        status.state = "Stopped"
        status.set(WORKSPACE_SUCCEEDED, "False", "workspaceStopped", f"flow run {flow_run_id} was cancelled")
        platform.write_status(status)


def _forget_last_run(status: WorkspaceStatus, platform: Platform) -> None:
    """What was true of the run before is not of this one; a service that is up still answers."""
    status.facts = {key: value for key, value in status.facts.items() if key not in _OF_A_RUN}
    status.facts["flow_run_id"] = str(current_run.id)
    if "cost" in status.facts:
        # To older API servers, an object whose fields are all taken back is null.
        status.facts["cost"] = NodeCost().as_dict()
    status.conditions.pop(JOB_STARTED, None)
    if RESOURCE_READY in status.conditions:
        status.set(RESOURCE_READY, "False", "workspaceResourceStatusNotReady", "a new run looks for nodes")
    if status.value(INFERENCE_READY) == "True" and platform.service(status.name) is None:
        status.set(INFERENCE_READY, "False", "WorkspaceInferenceStatusPending", "the service is not up")


def _try(act: Callable[[], object]) -> None:
    try:
        act()
    except KaitoFlowsError as exc:
        log(str(exc), warning=True)


def _finish(status: WorkspaceStatus, platform: Platform) -> None:
    if platform.read_status(status.name) is not None:  # else it was deleted meanwhile
        platform.write_status(status)
        ended = status.conditions[WORKSPACE_SUCCEEDED]
        platform.record(status.name, ended.reason, ended.message or status.state, warning=status.state == "Failed")
    artifacts.show_table("workspace-status", [columns(status)], f"Status of {status.name}")
    log(f"workspace {status.name}: {status.state}")


class _Progress:
    """Writes now and then how far the training is."""

    def __init__(self, status: WorkspaceStatus, platform: Platform) -> None:
        self._status, self._platform, self._written_at = status, platform, time.monotonic()

    def __call__(self, stage: str, event: Event) -> None:
        facts: dict[str, Any] = self._status.facts
        match event["event"]:
            case "progress" if "total" in event:
                facts |= {"step": event["step"], "steps": event["total"], "loss": round(float(event["loss"]), 4)}
            case "stage":
                self._status.set(WORKSPACE_SUCCEEDED, "False", "workspacePending", f"{stage}: {event['name']}")
            case "leased":
                facts["nodes"] = event["nodes"]
            case _:
                return
        # A wait is told at once: who looks then wants to know why.
        if event.get("name", "").startswith("waiting") or time.monotonic() - self._written_at > INTERVAL_SECONDS:
            self._written_at = time.monotonic()
            _try(lambda: self._platform.write_status(self._status))
