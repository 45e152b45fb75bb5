"""The end of a process that has run flows: what Prefect's client still holds is handed over within seconds, or dropped.

Prefect sends events and logs from queues, and empties them when the interpreter exits, however long that takes. Each
event costs seven seconds when the server is gone, and a run that has outlived its server by an hour has hundreds of
them: it would be done, and its process stay for another hour. What is dropped is the log of a run, never its result.
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import wraps
from typing import Any

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

SECONDS = 20.0
"""How long the interpreter's exit waits for Prefect's server; one that is up takes thousands of events in it."""


def leave_in_time(seconds: float = SECONDS) -> None:
    """From now on, let this process end `seconds` after its work, whatever Prefect's client has not handed over."""
    for service in (EventsWorker, APILogWorker):
        # Prefect has no setting for it, and the method is what it calls at the interpreter's exit.
        given: Any = getattr(service.drain, "__wrapped__", service.drain)
        service.drain = _bounded(given, seconds)  # type: ignore[method-assign]


def _bounded(drain: Any, seconds: float) -> Any:
    @wraps(drain)
    def bounded(self: Any, at_exit: bool = False) -> bool | Awaitable[bool]:
        if not at_exit:
            handed_over: bool | Awaitable[bool] = drain(self, at_exit)
            return handed_over
        # Of all services at once, so that two that are late take no longer than one. Their threads are daemons.
        self.drain_all(timeout=seconds)
        return True

    return bounded
