"""The runs of Workspaces in Prefect: made once for each wish, found again, stopped."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Failed

from kaito_flows.errors import InputError, KaitoFlowsError, ServiceError
from kaito_flows.flows.watching.wish import TAG, Body, Wish, parameter

PAUSED = "paused"
# One that has crashed is resumed by an automation.
_UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
    StateType.CRASHED,
]
_ENDED_BADLY = [StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
_QUEUED = {StateType.SCHEDULED, StateType.PENDING}
_BUSY = {429, 502, 503, 504}
_TRIES = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Deployments:
    """The names of the deployments that Workspaces are run by."""

    tune: str = "tune-workspace/kubernetes"
    serve: str = "serve-workspace/kubernetes"


@dataclass(frozen=True, slots=True)
class Run:
    """A flow run: its id, its state, and whether it still waits for its start."""

    id: str
    queued: bool
    state: State | None = None


class Runs:
    """Prefect's API, as far as the watcher needs it; an answer that does not come is a `ServiceError`."""

    def __init__(self, deployments: Deployments) -> None:
        self.deployments = deployments
        self._ids: dict[str, UUID] = {}
        self._client: PrefectClient | None = None
        # Many Workspaces at once are no reason to ask Prefect for everything at once.
        self._at_once = asyncio.Semaphore(8)

    async def open(self) -> None:
        """Make the client; it connects when it is asked for something."""
        self._client = await get_client().__aenter__()

    async def close(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            await self._client.__aexit__(None, None, None)

    async def answers(self) -> bool:
        """Whether Prefect's API answers, within two seconds."""
        try:
            async with asyncio.timeout(2):
                return await self._api.api_healthcheck() is None
        except TimeoutError:
            return False

    async def ensure(self, wish: Wish, body: Body) -> Run:
        """Return the run of this wish: made now, or found by its key. One that was paused is followed by another.

        Raises:
            ServiceError: Prefect does not answer; it is to be asked again.
            InputError: there is no such deployment, or it does not take the Workspace.
        """
        deployment = self.deployments.tune if wish.tuning else self.deployments.serve
        resumed = 0
        while True:
            key = f"{wish.key}:resumed-{resumed}" if resumed else wish.key
            run = await self._create(deployment, wish, key, body)
            if PAUSED not in run.tags:
                state = run.state.type if run.state else StateType.SCHEDULED
                return Run(str(run.id), state in _QUEUED, run.state)
            resumed += 1

    async def stop(self, wish: Wish, message: str, *, all_of_them: bool = False) -> list[str]:
        """Cancel this Workspace's unfinished runs that do not do what is wished now, or all; return their ids."""
        runs = [run for run in await self._unfinished(wish) if all_of_them or not wish.is_for(run.idempotency_key)]
        for run in runs:
            await self._cancel(run, message)
        return [str(run.id) for run in runs]

    async def pause(self, wish: Wish) -> list[str]:
        """Cancel this Workspace's unfinished runs so that they are followed by another when it goes on."""
        runs = await self._unfinished(wish)
        for run in runs:
            if PAUSED not in run.tags:
                await self._ask(partial(self._api.update_flow_run, run.id, tags=[*run.tags, PAUSED]))
            await self._cancel(run, PAUSED)
        return [str(run.id) for run in runs]

    async def settled(self, wish: Wish, ids: list[str], seconds: float) -> bool:
        """Whether those runs have ended, waited for that long: what a run in a pod stops, it stops itself."""
        deadline = time.monotonic() + seconds
        while ids and any(str(run.id) in ids for run in await self._unfinished(wish)):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.5)
        return True

    async def ended(self, since: datetime) -> list[FlowRun]:
        """Return the Workspaces' runs that have ended since then, and not well."""
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[TAG]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_ENDED_BADLY)),
            end_time=FlowRunFilterEndTime(after_=since),
        )
        return await self._ask(lambda: self._api.read_flow_runs(flow_run_filter=wanted))

    async def state(self, run_id: str) -> State | None:
        """Return the run's state; None if it is gone."""
        try:
            return (await self._ask(lambda: self._api.read_flow_run(UUID(run_id)))).state
        except ObjectNotFound:
            return None

    async def crashes(self, run_id: str) -> int:
        """Return how often the run has crashed; the runner and the worker both report it."""
        states = await self._ask(lambda: self._api.read_flow_run_states(UUID(run_id)))
        crashed = [s.type == StateType.CRASHED for s in sorted(states, key=lambda s: s.timestamp)]
        return sum(now and not before for before, now in pairwise([False, *crashed]))

    async def fail(self, run_id: str, message: str) -> None:
        """End the run for good."""
        failed: State[None] = Failed(message=message)
        await self._ask(lambda: self._api.set_flow_run_state(UUID(run_id), failed, force=True))

    @property
    def _api(self) -> PrefectClient:
        if self._client is None:
            raise RuntimeError("Runs.open() comes first")
        return self._client

    async def _create(self, deployment: str, wish: Wish, key: str, body: Body) -> FlowRun:
        if deployment not in self._ids:
            try:
                found = await self._ask(lambda: self._api.read_deployment_by_name(deployment))
            except ObjectNotFound as exc:
                raise _no_deployment(deployment) from exc
            self._ids[deployment] = found.id
        try:
            return await self._ask(
                lambda: self._api.create_flow_run_from_deployment(
                    self._ids[deployment],
                    parameters={"workspace": parameter(body)},
                    tags=wish.tags,
                    idempotency_key=key,
                )
            )
        except ObjectNotFound as exc:
            del self._ids[deployment]  # it was made anew, under another id
            raise _no_deployment(deployment) from exc

    async def _unfinished(self, wish: Wish) -> list[FlowRun]:
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[wish.own_tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)),
        )
        found = await self._ask(lambda: self._api.read_flow_runs(flow_run_filter=wanted))
        return [run for run in found if wish.owns(run.idempotency_key)]

    async def _cancel(self, run: FlowRun, message: str) -> None:
        if run.state is not None and run.state.type == StateType.CRASHED:
            cancelled: State[None] = Cancelled(message=message)
            await self._ask(lambda: self._api.set_flow_run_state(run.id, cancelled, force=True))
        elif run.state is None or run.state.type != StateType.CANCELLING:
            # One that has not started is cancelled by the server at once.
            await self._ask(lambda: self._api.set_flow_run_state(run.id, Cancelling(message=message)))

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Ask; a server that is busy, a moment later again."""
        for attempt in range(_TRIES):
            try:
                async with self._at_once:
                    return await question()
            except PrefectHTTPStatusError as exc:
                status = exc.response.status_code
                if status in _BUSY and attempt < _TRIES - 1:
                    await asyncio.sleep((0.3 * 2**attempt) * (1 + random.random()))
                    continue
                raise _refused(exc, status) from exc
            except (httpx.TransportError, RuntimeError) as exc:
                raise _unavailable(f"{type(exc).__name__}: {exc}") from exc
        raise _unavailable("it is busy")


def _unavailable(message: str) -> ServiceError:
    hint = "it is asked again until it does; PREFECT_API_URL says where it is"
    return ServiceError(f"does not answer: {message}", place="Prefect's API", hint=hint, code="prefect-unavailable")


def _no_deployment(name: str) -> InputError:
    hint = "`make deploy` makes it; it is looked for again"
    return InputError("there is no such deployment", place=name, hint=hint, code="deployment-not-found")


def _refused(exc: PrefectHTTPStatusError, status: int) -> KaitoFlowsError:
    if status >= 500 or status in _BUSY or status in (401, 403):
        return _unavailable(f"HTTP {status}")
    text: Any = exc.response.text
    return InputError(f"HTTP {status}: {text[:500]}", place="Prefect's API", code="run-refused")
