"""When a task is tried again: the error says so, not its text."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State

from kaito_flows.errors import KaitoFlowsError

RETRY_DELAYS = [1.0, 5.0]


def is_retryable(task: object, task_run: object, state: State[Any]) -> bool:
    """Whether the error behind a failed state can go away by itself."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, KaitoFlowsError) and error.retryable
