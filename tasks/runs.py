"""What has become of flow runs, asked of Prefect in one request for all."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from kaito_flows.nodes.reaping import RunState
from kaito_flows.tasks.progress import log

# How many runs Prefect's API tells of at once, and how often it is asked again before it counts as away.
_PAGE = 200
_RETRIES = 2


def run_states(ids: Iterable[str]) -> dict[str, RunState] | None:
    """Return each run's state, by id, without those that Prefect does not know.

    None: Prefect does not answer, or no server is named (PREFECT_API_URL).
    """
    if get_current_settings().api.url is None:
        return None
    asked = sorted({found for id_ in ids if (found := _uuid(id_))}, key=str)
    states: dict[str, RunState] = {}
    if not asked:
        return states
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _RETRIES}), get_client(sync_client=True) as client:
            for start in range(0, len(asked), _PAGE):
                wanted = FlowRunFilter(id=FlowRunFilterId(any_=asked[start : start + _PAGE]))
                for run in client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE):
                    if run.state is not None:
                        states[str(run.id)] = RunState(run.state.type.value, run.state.timestamp)
    except (httpx.HTTPError, PrefectException, RuntimeError) as exc:
        log(f"Prefect does not answer: {exc}", warning=True)
        return None
    return states


def _uuid(text: str) -> UUID | None:
    """The run's id; None for what is none, of which Prefect cannot know."""
    try:
        return UUID(text)
    except ValueError:
        return None
