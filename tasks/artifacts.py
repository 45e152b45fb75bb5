"""What a run shows in the Prefect UI. Showing is best effort: a server that is away fails no run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from kaito_flows.tasks.progress import log

INTERVAL_SECONDS = 10.0

# Prefect's client tries for a minute: once of a server that is away, then for a while each artifact is tried once.
_AWAY_SECONDS = 300.0
_away_at: dict[str | None, float] = {}


def show_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Show rows as a table."""
    _best_effort(lambda: create_table_artifact(key=key, table=list(rows), description=description))


def show_markdown(key: str, text: str, description: str) -> None:
    """Show a page of Markdown."""
    _best_effort(lambda: create_markdown_artifact(key=key, markdown=text, description=description))


class ProgressArtifact:
    """A progress artifact that is updated at most every ten seconds, and at the end."""

    def __init__(self, key: str, description: str) -> None:
        self._artifact: UUID | None = None
        self._shown_at = float("-inf")
        self._key, self._description = key, description

    def update(self, step: int, total: int) -> None:
        """Show that `step` of `total` steps are done."""
        if time.monotonic() - self._shown_at < INTERVAL_SECONDS and step < total:
            return
        percent = 100.0 * step / max(total, 1)
        _best_effort(lambda: self._show(percent))
        self._shown_at = time.monotonic()

    def _show(self, percent: float) -> None:
        if self._artifact is None:
            created = create_progress_artifact(progress=percent, key=self._key, description=self._description)
            self._artifact = created if isinstance(created, UUID) else None
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)


def _best_effort(show: Callable[[], object]) -> None:
    server = PREFECT_API_URL.value()
    away = time.monotonic() - _away_at.get(server, -math.inf) < _AWAY_SECONDS
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0} if away else {}):
            show()
        _away_at.pop(server, None)
    except (httpx.HTTPError, PrefectException, OSError) as exc:
        if isinstance(exc, httpx.TransportError):
            _away_at[server] = time.monotonic()
        log(f"not shown in the UI: {exc}", warning=True)
