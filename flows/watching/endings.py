"""What becomes of runs that cannot say it themselves, as Prefect's event stream tells it: nothing is asked for.

    Failed, TimedOut, Cancelled ─► ended        a run without rights in the namespace, or that never came to its status
    Crashed ─► for the tenth time? failed here. Still so a minute later? ended: nobody resumes it. Else: begun again
    pod.pending with a diagnosis ─► why the run's pod does not start

What a run has said itself is never changed: the Workspace's status decides whether there is something to tell.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.schemas.objects import State, StateType
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.events.schemas.events import Event

from kaito_flows.errors import KaitoFlowsError, RunError, from_text
from kaito_flows.flows.watching.wish import TAG, shortened
from kaito_flows.tasks.status import MAX_RUNS
from kaito_flows.workspace.status import reason_of

if TYPE_CHECKING:
    from kaito_flows.flows.watching.runs import Runs

_RUN, _POD = "prefect.flow-run.", "prefect.kubernetes.pod."
_HEARD = [*(f"{_RUN}{state}" for state in ("Failed", "TimedOut", "Crashed", "Cancelled")), f"{_POD}pending"]
_REMEMBERED = 1000
_LONGEST_DELAY = 60.0
# So long a connection that is dead may look alive, and so long a clock may be wrong.
_SLACK = timedelta(minutes=2)
# The automation resumes after 15 s.
_RESUMED_SECONDS = 60.0

logger = logging.getLogger("kaito_flows.watch")


@dataclass(frozen=True, slots=True)
class News:
    """What became of a run: the state and the condition's reason and message that the Workspace gets."""

    flow_run_id: str
    state: str
    reason: str
    message: str

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end."""
        return self.state != "Pending"


class Endings:
    """Listens to Prefect for as long as the watcher lives."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._news: dict[str, News] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to listen."""
        self._later(self._listen())

    async def stop(self) -> None:
        """Listen no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of(self, run_id: str) -> News | None:
        """Return what became of the run, if it is known."""
        return self._news.get(run_id)

    async def learn(self, run_id: str, state: State | None) -> None:
        """Take in the state that a run was found in."""
        if state is None:
            return
        message = state.message or ""
        if state.type == StateType.FAILED:
            self._tell(_failure(run_id, message or "no more is known"))
        elif state.type == StateType.CANCELLED:
            self._tell(News(run_id, "Stopped", "workspaceStopped", f"flow run {run_id} was cancelled"))
        elif state.type == StateType.CRASHED:
            await self._crashed(run_id, message)

    async def _listen(self) -> None:
        delay, missing = 1.0, datetime.now(UTC) - _SLACK
        while True:
            connected = False
            try:
                wanted = EventFilter(event=EventNameFilter(name=_HEARD))
                async with get_events_subscriber(filter=wanted, reconnection_attempts=0) as events:
                    connected, delay = True, 1.0
                    for run in await self._runs.ended(missing):
                        await self.learn(str(run.id), run.state)
                    async for event in events:
                        await self._hear(event)
            except Exception as exc:  # noqa: BLE001 - whatever it is, a server that comes back is to be heard again
                logger.debug("Prefect's events: %s: %s", type(exc).__name__, exc)
            if connected:
                missing = datetime.now(UTC) - _SLACK
            await asyncio.sleep(delay * (0.75 + random.random() / 2))
            delay = min(_LONGEST_DELAY, delay * 2)

    async def _hear(self, event: Event) -> None:
        facts = event.resource
        if event.event.startswith(_POD):
            runs = event.resource_in_role.get("flow-run")
            if runs is not None and (diagnosis := facts.get("kubernetes.diagnosis")):
                run_id = runs.id.removeprefix(_RUN)
                message = f"flow run {run_id} waits for its pod {facts.get('prefect.resource.name')}: {diagnosis}"
                self._tell(News(run_id, "Pending", "workspacePending", message))
        elif any(related.id == f"prefect.tag.{TAG}" for related in event.related):
            run_id, type_ = facts.id.removeprefix(_RUN), StateType(facts["prefect.state-type"])
            await self.learn(run_id, State(type=type_, message=facts.get("prefect.state-message", "")))

    async def _crashed(self, run_id: str, message: str) -> None:
        if await self._runs.crashes(run_id) >= MAX_RUNS:
            text = f"crashed {MAX_RUNS} times, at last: {message}"
            error = RunError(text, place="run", hint="its logs in Prefect say more", code="too-many-crashes")
            await self._runs.fail(run_id, f"RunError: {error}")
            return  # which is heard of
        text = f"flow run {run_id} crashed, and is begun again: {message}"
        self._tell(News(run_id, "Pending", "workspacePending", shortened(text)))
        self._later(self._give_up(run_id))

    async def _give_up(self, run_id: str) -> None:
        """Tell of a run that has crashed and was not resumed."""
        await asyncio.sleep(_RESUMED_SECONDS)
        try:
            state = await self._runs.state(run_id)
        except KaitoFlowsError as exc:
            logger.warning("flow run %s: %s", run_id, exc)
            return
        if state is not None and state.type == StateType.CRASHED:
            hint = "nothing resumes it: `python -m kaito_flows.flows.automations` makes what does"
            error = RunError(state.message or "crashed", place="run", hint=hint, code="run-crashed")
            self._tell(_failure(run_id, f"RunError: {error}"))

    def _tell(self, news: News) -> None:
        self._news.pop(news.flow_run_id, None)
        self._news[news.flow_run_id] = news
        while len(self._news) > _REMEMBERED:
            del self._news[next(iter(self._news))]

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _failure(run_id: str, message: str) -> News:
    """A failure, by what Prefect keeps of the exception: `Flow run encountered an exception: RunError: code: …`."""
    if (error := from_text(message)) is not None:
        return News(run_id, "Failed", reason_of(error.code), shortened(str(error)))
    said = message.removeprefix("Flow run encountered an exception: ")
    return News(run_id, "Failed", "RunFailed", shortened(said))
