"""Tuning in another cluster, in another region or cloud, when no node can be had in this one.

    no node here ─► a run of `tune-workspace/<place>` ─► that cluster's worker and nodes ─► the adapter in the registry

A place is a cluster with a worker of its own for this Prefect server (`KAITO_FLOWS_PLACE` names it). What the two runs
share is Prefect and the registry: the same inputs have the same identity everywhere, so that the run there finds the
dataset and the last checkpoint of the one here, and the one here the adapter.

The run there is a guest: its Workspace has an annotation that says whose, it goes to no further place, serves nothing,
and leaves nothing behind in that cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run as current_run
from prefect.runtime import task_run as current_task
from prefect.states import Cancelled, Cancelling

from kaito_flows.errors import (
    AccessError,
    CloudError,
    ClusterError,
    KaitoFlowsError,
    RunError,
    SchedulingError,
    from_text,
)
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.platforms import Platform
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import log, stage, tell
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.spec import GUEST_ANNOTATION

LOOK_SECONDS = 5.0
"""How often the run in the other place is looked at."""

CRASHED_SECONDS = 120.0
"""How long a run that has crashed may take to be resumed, which an automation does after 15 s."""

_STAGE = "tune"
_COST = "kaito-flows.cost."
_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CRASHED]
# What another place may do without: nodes, a cloud, a cluster, a right, and what has to be there before.
_OF_A_PLACE = (SchedulingError, CloudError, ClusterError, AccessError)
_CODES_OF_A_PLACE = {
    "config-map-not-found", "namespace-not-found", "no-cloud", "no-cluster", "secret-not-found", "too-expensive",
    "workspace-differs",
}  # fmt: skip


@task(name="tune-elsewhere", task_run_name="tune-{workspace.metadata.name}-elsewhere", cache_policy=NO_CACHE)
def tune_elsewhere(
    workspace: Workspace,
    training_config: str | None,
    places: Sequence[str],
    because: SchedulingError,
    platform: Platform,
    patience_seconds: float,
) -> NodeCost:
    """Tune in the first of the places that has nodes; return what they cost. The adapter is in the registry then.

    A run of this Workspace that was begun there before is taken up again. `patience_seconds` is how long a place's
    worker may take to start the run.

    Raises:
        SchedulingError: (code `no-node`) no place has any, with what each says, and `because` for this one.
        KaitoFlowsError: what the training there failed with; or (codes `workspace-deleted`, `workspace-changed`).
    """
    with stage(_STAGE, doing="elsewhere"):
        reasons = [because.message]
        for place in places:
            guest = _Guest(place, workspace, training_config, patience_seconds)
            try:
                cost = guest.follow(lambda: platform.check_known(workspace.name))
            except KaitoFlowsError as exc:
                if not isinstance(exc, _OF_A_PLACE) and exc.code not in _CODES_OF_A_PLACE:
                    raise
                reasons.append(f"{place}: {exc.code}: {exc.message}")
                log(f"{place} cannot do it: {exc}", warning=True)
                tell(_STAGE, "stage", name=f"{place} cannot do it: {exc}")
                continue
            log(f"tuned in {place}")
            return cost
        raise SchedulingError("; ".join(reasons), place=because.place, hint=because.hint, code="no-node")


class _Guest:
    """The run in one place."""

    def __init__(self, place: str, workspace: Workspace, training_config: str | None, patience_seconds: float) -> None:
        self.deployment = f"tune-workspace/{place}"
        self._place, self._patience = place, patience_seconds
        self._workspace, self._training_config = workspace, training_config

    def follow(self, check: Callable[[], object]) -> NodeCost:
        """Begin the run, or find it, and wait for its end; when `check` raises, or this process is stopped, it ends."""
        with get_client(sync_client=True) as client:
            run = self._begin(client)
            log(f"trying {self._place}: flow run {run.id}")
            try:
                return self._await(client, run, check)
            except (KaitoFlowsError, KeyboardInterrupt):
                # What went wrong first is what counts.
                with suppress(httpx.HTTPError, PrefectException):
                    _stop(client, client.read_flow_run(run.id))
                raise

    def _begin(self, client: SyncPrefectClient) -> FlowRun:
        try:
            deployment = client.read_deployment_by_name(self.deployment)
        except ObjectNotFound as exc:
            hint = "the worker of that cluster makes it, where KAITO_FLOWS_PLACE says that name"
            raise SchedulingError(
                "there is no such deployment", place=self.deployment, hint=hint, code="deployment-not-found"
            ) from exc
        home = client.read_flow_run(UUID(current_run.id))
        key = f"{home.idempotency_key or home.id}:elsewhere-{self._place}"
        attempt = 1
        while True:
            run = client.create_flow_run_from_deployment(
                deployment.id,
                parameters={
                    "workspace": self._document(str(home.id)), "training_config": self._training_config, "serve": False,
                },
                tags=home.tags,
                idempotency_key=f"{key}-{attempt}",
                parent_task_run_id=UUID(current_task.id),
            )  # fmt: skip
            if not _has_failed(run):
                return run
            attempt += 1  # of an earlier try: this one has begun anew

    def _document(self, home: str) -> dict[str, Any]:
        document = self._workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
        document["apiVersion"] = self._workspace.api_version
        kept = {key: value for key, value in document["metadata"].items() if key in ("name", "namespace", "labels")}
        annotations = {**self._workspace.metadata.annotations, GUEST_ANNOTATION: home}
        return {**document, "metadata": {**kept, "annotations": annotations}}

    def _await(self, client: SyncPrefectClient, run: FlowRun, check: Callable[[], object]) -> NodeCost:
        told, since = "", time.monotonic()
        while True:
            state = run.state
            if state is not None and state.name != told:
                told, since = state.name or "", time.monotonic()
                tell(_STAGE, "stage", name=f"waiting: in {self._place}: flow run {run.id} is {told}")
            waited = time.monotonic() - since
            match state.type if state else StateType.SCHEDULED:
                case StateType.COMPLETED:
                    return _cost_of(run)
                case StateType.FAILED:
                    raise self._failure(state)
                case StateType.CANCELLED:
                    raise RunError("its run was cancelled", place=self.deployment, code="cancelled")
                case StateType.CRASHED if waited > CRASHED_SECONDS:
                    raise RunError("its run has crashed for good", place=self.deployment, code="run-crashed")
                case StateType.SCHEDULED | StateType.PENDING if waited > self._patience:
                    hint = "does its worker run, and reach this Prefect server?"
                    message = f"its run was not started in {waited:.0f} s"
                    raise SchedulingError(message, place=self.deployment, hint=hint, code="not-started")
            time.sleep(LOOK_SECONDS)
            check()
            run = self._look(client, run)

    def _look(self, client: SyncPrefectClient, run: FlowRun) -> FlowRun:
        try:
            return client.read_flow_run(run.id)
        except ObjectNotFound as exc:
            raise RunError(f"flow run {run.id} was deleted", place=self.deployment, code="cancelled") from exc
        except httpx.HTTPError as exc:
            log(f"Prefect does not answer: {exc}", warning=True)
            return run

    def _failure(self, state: State[Any] | None) -> KaitoFlowsError:
        message = (state.message if state else None) or "it failed, and no more is known"
        return from_text(message) or RunError(message, place=self.deployment)


def stop_elsewhere(flow_run_id: UUID) -> None:
    """Cancel what a run has begun in other places, and has not ended."""
    wanted = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)),
    )
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=wanted):
            _stop(client, run)


@contextmanager
def as_guest(workspace: Workspace, platform: Platform) -> Iterator[None]:
    """Leave nothing behind in this cluster, if the run is another one's; what its nodes cost is kept with its run."""
    if not workspace.guest_of:
        yield
        return
    try:
        yield
    except Exception:
        leave(workspace.name, platform)
        raise
    leave(workspace.name, platform)


def leave(workspace: str, platform: Platform) -> None:
    """Keep what a guest's nodes have cost, and remove what it has made. What cannot be done is told, and no more."""
    try:
        status = platform.read_status(workspace)
        if status is not None and current_run.id:
            cost = status.facts.get("cost") or {}
            labels = {_COST + key: value for key, value in cost.items() if value is not None}
            with get_client(sync_client=True) as client:
                client.update_flow_run_labels(UUID(current_run.id), {_COST + "known": True, **labels})
        platform.delete(workspace)
    except (KaitoFlowsError, httpx.HTTPError) as exc:
        log(f"something of {workspace} is left here: {exc}", warning=True)


def other_places(workspace: Workspace, settings: Settings) -> tuple[str, ...]:
    """The places that a run may go to; a guest has come from one of them."""
    return () if workspace.guest_of else settings.other_places


def namespace_of(workspace: Workspace, settings: Settings) -> str:
    """Where the run works: a place may have a namespace for guests, if `KAITO_FLOWS_NAMESPACE` says so."""
    return (settings.namespace if workspace.guest_of else "") or workspace.namespace


def _cost_of(run: FlowRun) -> NodeCost:
    found = {key.removeprefix(_COST): value for key, value in run.labels.items() if key.startswith(_COST)}
    if not found.pop("known", False) or not found:
        return NodeCost()
    return NodeCost.from_dict({"usd": None, **found})


def _has_failed(run: FlowRun) -> bool:
    return run.state is not None and run.state.type in (StateType.FAILED, StateType.CANCELLED)


def _stop(client: SyncPrefectClient, run: FlowRun) -> None:
    if run.state is None or not run.state.is_final():
        client.set_flow_run_state(run.id, Cancelling(message="the run that it is for has ended"))
    elif run.state.type == StateType.CRASHED:  # or it would be resumed
        client.set_flow_run_state(run.id, Cancelled(message="the run that it is for has ended"), force=True)
