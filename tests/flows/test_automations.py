"""The automations, on a real Prefect server: made once, mended, and doing what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from kaito_flows.flows.automations import automations, ensure_automations
from kaito_flows.flows.delete_workspace import delete_workspace


@pytest.fixture(autouse=True)
def of_that_server(server: Any) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: server.api}):
        yield


def names(server: Any) -> list[str]:
    found = httpx.post(f"{server.api}/automations/filter", json={}, timeout=30).json()
    return sorted(automation["name"] for automation in found)


def post(api: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """POST, and again while a server on SQLite says that it is busy."""
    for _ in range(20):
        answer = api.post(path, json=body)
        if answer.status_code != 503:
            break
        time.sleep(0.5)
    answer.raise_for_status()
    return answer.json()


def test_they_are_made_once_and_mended_where_they_differ(server: Any) -> None:
    assert ensure_automations() == {"crash-zombies": "created", "resume-crashed": "created"}
    assert ensure_automations() == {"crash-zombies": "unchanged", "resume-crashed": "unchanged"}
    slower = automations(heartbeat=timedelta(seconds=60))
    assert ensure_automations(slower) == {"crash-zombies": "updated", "resume-crashed": "unchanged"}
    assert names(server) == ["crash-zombies", "resume-crashed"]


def test_the_order_of_what_is_expected_is_no_difference(server: Any) -> None:
    names = [f"prefect.flow-run.{number}" for number in range(64)]
    for ordered, done in ((names, "created"), (names[::-1], "unchanged")):
        [_, resume] = automations()
        trigger = resume.trigger.model_copy(update={"expect": set(ordered)})
        wanted = resume.model_copy(update={"name": "of-many", "trigger": trigger})
        assert ensure_automations([wanted]) == {"of-many": done}


def test_a_run_that_falls_silent_crashes_and_is_scheduled_again(server: Any) -> None:
    ensure_automations(automations(heartbeat=timedelta(seconds=4), resume_after=timedelta(seconds=10)))
    with httpx.Client(base_url=server.api, timeout=30) as api:
        flow = post(api, "/flows/", {"name": "crashing"})["id"]
        deployment = post(api, "/deployments/", {"name": "any", "flow_id": flow})["id"]
        path = f"/deployments/{deployment}/create_flow_run"
        runs = {tag: post(api, path, {"tags": [tag]})["id"] for tag in ("kaito", "other")}
        for run in runs.values():
            post(api, f"/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
            time.sleep(1)
            beat = {
                "id": str(uuid.uuid4()),
                "occurred": datetime.now(UTC).isoformat(),
                "event": "prefect.flow-run.heartbeat",
                "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            }
            api.post("/events", json=[beat]).raise_for_status()

        def states(run: str) -> list[str]:
            return [s["name"] for s in api.get("/flow_run_states/", params={"flow_run_id": run}).json()]

        deadline = time.monotonic() + 90
        while "AwaitingRetry" not in states(runs["kaito"]):
            assert time.monotonic() < deadline, states(runs["kaito"])
            time.sleep(1)
        assert states(runs["kaito"])[-2:] == ["Crashed", "AwaitingRetry"]
        assert states(runs["other"])[-1] == "Crashed", "only what is a Workspace's is resumed"


def test_deleting_asks_the_platform_by_name_alone(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, namespace: str) -> None:
            self.namespace = namespace

        def delete(self, name: str) -> list[str]:
            asked.append((self.namespace, name))
            return [f"job/{name}"]

    monkeypatch.setattr(f"{delete_workspace.fn.__module__}.platform_in", Recorder)
    assert delete_workspace("team", "Not A Valid Name", "uid") == ["job/Not A Valid Name"]
    assert delete_workspace.fn("team", "w") == ["job/w"], "and it works where there is no Prefect"
    assert asked == [("team", "Not A Valid Name"), ("team", "w")]


def test_the_deletion_of_a_workspace_starts_the_reaper(
    server: Any, monkeypatch: pytest.MonkeyPatch, repository_root: Path
) -> None:
    class Nothing:
        def __init__(self, namespace: str) -> None: ...

        def delete(self, name: str) -> list[str]:
            return []

    def reapers() -> list[dict[str, Any]]:
        wanted = {"flows": {"name": {"any_": ["reap-nodes"]}}}
        found = httpx.post(f"{server.api}/flow_runs/filter", json=wanted, timeout=60).json()
        return [run for run in found if not run["auto_scheduled"]]

    monkeypatch.setattr(f"{delete_workspace.fn.__module__}.platform_in", Nothing)
    file = repository_root / "deployments/kubernetes/base/prefect.yaml"
    environment = {
        **os.environ,
        "PREFECT_API_URL": server.api,
        "KAITO_FLOWS_WORKER_IMAGE": "any",
        "KAITO_FLOWS_PLACE": "kubernetes",
    }
    prefect = Path(sys.executable).parent / "prefect"
    for _ in range(2):  # as each start of the worker does
        command = [prefect, "--no-prompt", "deploy", "--all", "--prefect-file", file]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    with httpx.Client(base_url=server.api, timeout=30) as api:
        deployment = api.get("/deployments/name/reap-nodes/kubernetes").json()
    [schedule] = deployment["schedules"]
    assert (schedule["active"], schedule["schedule"]["interval"]) == (True, 300)
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"

    assert reapers() == []
    delete_workspace("team", "w", "uid")
    deadline = time.monotonic() + 30
    while not (found := reapers()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(2)
    assert [run["id"] for run in reapers()] == [run["id"] for run in found], "once"
    assert found[0]["deployment_id"] == deployment["id"]
