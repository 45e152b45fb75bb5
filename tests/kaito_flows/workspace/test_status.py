"""The status of a Workspace: conditions as Kubernetes keeps them, columns as KAITO prints them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from kaito_flows.workspace.status import WorkspaceStatus, columns

START = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def status(version: str = "kaito.sh/v1alpha1") -> WorkspaceStatus:
    made = WorkspaceStatus("w", version, "Standard_NC24ads_A100_v4", created="2026-11-24T12:00:00Z")
    made.set("ResourceReady", "True", "r", now="t1")
    made.set("WorkspaceSucceeded", "False", "r", now="t1")
    return made


def test_a_transition_time_moves_only_when_the_status_does() -> None:
    made = status()
    made.set("ResourceReady", "True", "again", "more", now="t2")
    assert made.conditions["ResourceReady"].last_transition_time == "t1"
    assert made.conditions["ResourceReady"].reason == "again"
    made.set("ResourceReady", "False", "gone", now="t3")
    assert made.conditions["ResourceReady"].last_transition_time == "t3"


def test_the_columns_of_v1alpha1() -> None:
    assert columns(status(), now=START) == {
        "NAME": "w",
        "INSTANCE": "Standard_NC24ads_A100_v4",
        "RESOURCEREADY": "True",
        "INFERENCEREADY": "",
        "WORKSPACEREADY": "False",
        "AGE": "0s",
    }


def test_the_columns_of_v1beta1() -> None:
    assert list(columns(status("kaito.sh/v1beta1"), now=START)) == [
        "NAME", "INSTANCE", "RESOURCEREADY", "INFERENCEREADY", "JOBSTARTED", "WORKSPACESUCCEEDED", "STATE",
        "TARGETNODECOUNT", "AGE",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(0, "0s"), (59, "59s"), (119, "119s"), (120, "2m"), (3599, "59m"), (3600, "1h"), (86399, "23h"), (86400, "1d")],
)
def test_ages_are_shortened(seconds: int, age: str) -> None:
    assert columns(status(), now=START + timedelta(seconds=seconds))["AGE"] == age


def test_a_status_is_json_and_comes_back_the_same() -> None:
    made = status()
    assert WorkspaceStatus.from_dict(json.loads(json.dumps(made.as_dict()))) == made
