"""What has become of flow runs, when Prefect does not answer or is not there."""

from __future__ import annotations

import time
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from kaito_flows.tasks import runs
from kaito_flows.tasks.runs import run_states


def test_a_server_that_is_away_is_told_from_one_that_knows_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_RETRIES", 0)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        begun = time.monotonic()
        assert run_states([str(uuid4())]) is None
        assert time.monotonic() - begun < 5
        assert run_states([]) == {}
        assert run_states(["", "no uuid"]) == {}, "of which it cannot know"


def test_where_no_server_is_named_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert run_states([str(uuid4())]) is None
