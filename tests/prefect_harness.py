"""Prefect's test harness, which ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from prefect.events.worker import EventsWorker
from prefect.testing.utilities import prefect_test_harness


@contextmanager
def harness() -> Iterator[None]:
    """A Prefect server for as long as the block lasts."""
    drain = EventsWorker.drain_all
    with (
        # The harness would wait without end for events that Prefect's client has lost.
        mock.patch.object(EventsWorker, "drain_all", lambda: drain(timeout=20)),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield
