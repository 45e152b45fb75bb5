"""What becomes of runs that do not say it, by the states that Prefect tells of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect.client.schemas.objects import State, StateType

from kaito_flows.flows.watching import endings
from kaito_flows.flows.watching.endings import Endings, News


class Runs:
    """Prefect's answers: how often the run has crashed, and its state by now."""

    def __init__(self, crashes: int, state: StateType) -> None:
        self._crashes, self._state = crashes, state
        self.failed: list[str] = []

    async def crashes(self, run_id: str) -> int:
        return self._crashes

    async def state(self, run_id: str) -> State:
        return State(type=self._state, message="the node went away")

    async def fail(self, run_id: str, message: str) -> None:
        self.failed.append(message)


def learned(monkeypatch: pytest.MonkeyPatch, runs: Any, type_: StateType, message: str = "") -> News | None:
    """What is told of a run in that state, a moment later."""
    monkeypatch.setattr(endings, "_RESUMED_SECONDS", 0.01)

    async def learn() -> News | None:
        found = Endings(runs)
        await found.learn("run-1", State(type=type_, message=message))
        await asyncio.sleep(0.1)
        await found.stop()
        return found.of("run-1")

    return asyncio.run(learn())


def test_an_error_of_ours_is_told_by_its_code_and_any_other_by_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(0, StateType.FAILED)
    said = "Flow run encountered an exception: AccessError: access-denied: team: no (ask an administrator)"
    text = "access-denied: team: no (ask an administrator)"
    assert learned(monkeypatch, runs, StateType.FAILED, said) == News("run-1", "Failed", "AccessDenied", text)
    other = "Flow run encountered an exception: ValueError: a: b"
    assert learned(monkeypatch, runs, StateType.FAILED, other) == News(
        "run-1", "Failed", "RunFailed", "ValueError: a: b"
    )
    assert learned(monkeypatch, runs, StateType.COMPLETED) is None


def test_a_crash_is_the_end_only_where_nothing_resumes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = learned(monkeypatch, Runs(1, StateType.SCHEDULED), StateType.CRASHED, "the node went away")
    assert resumed is not None
    assert (resumed.ended, resumed.reason) == (False, "workspacePending")
    left = learned(monkeypatch, Runs(1, StateType.CRASHED), StateType.CRASHED, "the node went away")
    assert left is not None
    assert (left.state, left.reason) == ("Failed", "RunCrashed")
    assert "the node went away" in left.message and "kaito_flows.flows.automations" in left.message


def test_a_run_that_crashes_again_and_again_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for crashes, times in ((9, 0), (10, 1), (11, 1)):
        runs = Runs(crashes, StateType.CRASHED)
        learned(monkeypatch, runs, StateType.CRASHED, "no such image")
        assert len(runs.failed) == times
        assert all("too-many-crashes" in message and "no such image" in message for message in runs.failed)
