"""The watcher's part of a status: changes that can be made again, and that leave alone what the run has said."""

from __future__ import annotations

import copy
from typing import Any

from kaito_flows.flows.watching import status
from kaito_flows.flows.watching.endings import News


def condition(body: dict[str, Any], type_: str = "WorkspaceSucceeded") -> dict[str, Any]:
    [found] = [c for c in body["status"]["conditions"] if c["type"] == type_]
    return dict(found)


def test_a_new_workspace_is_told_to_be_queued() -> None:
    body: dict[str, Any] = {"metadata": {}}
    status.queued("run-1", 1)(body)
    assert body["status"]["run"] == {"flowRunId": "run-1", "generation": 1}
    assert body["status"]["state"] == "Pending"
    assert condition(body)["reason"] == "workspacePending"
    assert condition(body)["observedGeneration"] == 1


def test_what_the_run_has_said_meanwhile_is_left_alone() -> None:
    body: dict[str, Any] = {"status": {"state": "Running", "run": {"flowRunId": "run-1", "step": 4}}}
    before = copy.deepcopy(body)
    status.queued("run-1", 1)(body)
    assert body == before


def test_other_conditions_stay() -> None:
    node = {"type": "ResourceReady", "status": "True", "reason": "r", "message": "", "lastTransitionTime": "t"}
    body: dict[str, Any] = {"status": {"conditions": [dict(node)]}}
    status.told("InvalidWorkspace", "why", 2, state="Failed")(body)
    assert condition(body, "ResourceReady") == node
    assert condition(body)["message"] == "why"
    assert body["status"]["state"] == "Failed"


def test_the_time_moves_with_the_status_alone() -> None:
    old = {"type": "WorkspaceSucceeded", "status": "False", "reason": "r", "message": "", "lastTransitionTime": "t"}
    body: dict[str, Any] = {"status": {"conditions": [old]}}
    status.told("InvalidWorkspace", "why", 2)(body)
    assert condition(body)["lastTransitionTime"] == "t"
    body["status"]["conditions"][0]["status"] = "True"
    status.told("InvalidWorkspace", "other", 2)(body)
    assert condition(body)["lastTransitionTime"] != "t"


def test_what_was_said_already_is_not_said_again() -> None:
    body: dict[str, Any] = {}
    status.told("PrefectUnavailable", "why", 2)(body)
    before = copy.deepcopy(body)
    status.told("PrefectUnavailable", "why", 2)(body)
    assert body == before


def test_a_generation_that_succeeded_is_settled_and_the_next_is_not() -> None:
    body = {"status": {"observedGeneration": 2, "state": "Succeeded"}}
    assert status.is_settled(body, 2)
    assert not status.is_settled(body, 3)
    assert not status.is_settled({}, 1)


def test_a_change_without_effect_is_known_as_one() -> None:
    body: dict[str, Any] = {"metadata": {"name": "w"}}
    change = status.told("PrefectUnavailable", "why", 2)
    assert status.changes(change, body)
    assert "status" not in body, "it was tried on a copy"
    change(body)
    assert not status.changes(change, body)


def test_the_status_of_a_generation_that_has_a_run_is_the_runs() -> None:
    body: dict[str, Any] = {}
    assert not status.has_run(body, 1)
    status.queued("run-1", 1)(body)
    assert status.has_run(body, 1)
    assert not status.has_run(body, 2)


def queued_body(state: str = "Pending", **metadata: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"metadata": {"generation": 1, **metadata}}
    status.queued("run-1", 1)(body)
    body["status"]["state"] = state
    return body


def test_a_run_that_failed_without_a_word_is_told_and_one_that_said_how_it_ended_is_not() -> None:
    body = queued_body("Running")
    assert status.awaited_run(body) == "run-1"
    status.became(News("run-1", "Failed", "AccessRefused", "no rights"))(body)
    assert (body["status"]["state"], condition(body)["reason"]) == ("Failed", "AccessRefused")
    assert status.awaited_run(body) == ""

    before = copy.deepcopy(body)
    status.became(News("run-1", "Failed", "RunFailed", "something else"))(body)
    assert body == before


def test_only_the_run_of_the_newest_generation_is_waited_for() -> None:
    assert status.awaited_run(queued_body(generation=2)) == ""
    body = queued_body()
    before = copy.deepcopy(body)
    status.became(News("run-0", "Failed", "RunFailed", "an older run"))(body)
    assert body == before


def test_why_a_pod_does_not_start_is_told_of_a_run_that_has_not_begun() -> None:
    body = queued_body()
    status.became(News("run-1", "Pending", "workspacePending", "its pod: ImagePullError"))(body)
    assert (body["status"]["state"], condition(body)["message"]) == ("Pending", "its pod: ImagePullError")
    body = queued_body("Running")
    status.became(News("run-1", "Pending", "workspacePending", "its pod: ImagePullError"))(body)
    assert "queued" in condition(body)["message"]
