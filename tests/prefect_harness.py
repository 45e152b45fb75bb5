"""Prefect's test harness, which ends."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from prefect.events.worker import EventsWorker
from prefect.testing.utilities import prefect_test_harness

from kaito_flows.flows.leaving import leave_in_time

_drain_all = EventsWorker.drain_all


@contextmanager
def harness() -> Iterator[None]:
    """A Prefect server for as long as the block lasts."""
    leave_in_time()  # the test process, too

    async def drain_and_drop() -> None:
        workers: list[Any] = list(EventsWorker._instances.values())
        left = _drain_all(timeout=20)
        assert isinstance(left, Awaitable)
        await left
        # The harness would wait without end for events that Prefect's client has lost, and then try them on and on.
        for worker in workers:
            with contextlib.suppress(queue.Empty):
                while True:
                    worker._queue.get_nowait()
            worker._queue.put(None)

    with (
        mock.patch.object(EventsWorker, "drain_all", drain_and_drop),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
