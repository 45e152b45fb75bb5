"""What a Workspace asks for: its run's key, its tags, what wakes the watcher, what is told of faults."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.flows.watching.wish import Wish, essence, faults_of, message_of, parameter
from kaito_flows.workspace import parse_workspace


@pytest.fixture
def body() -> dict[str, Any]:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {
            "name": "w",
            "namespace": "team",
            "uid": "u-1",
            "generation": 3,
            "resourceVersion": "77",
            "managedFields": [{"manager": "kubectl"}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "kaito-flows/serve": "false"},
            "labels": {"app": "w"},
        },
        "resource": {"count": 1, "instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {}},
        "tuning": {
            "preset": {"name": "phi-3-mini-128k-instruct", "accessMode": "public"},
            "method": "qlora",
            "config": "in-the-cluster",
            "input": {"urls": ["https://example.com/a"]},
            "output": {"image": "registry.example.com/a:1", "imagePushSecret": "push"},
        },
        "status": {"state": "Running"},
    }


def annotated(body: dict[str, Any], **annotations: str) -> dict[str, Any]:
    ours = {f"kaito-flows/{key}": value for key, value in annotations.items()}
    return {**body, "metadata": {**body["metadata"], "annotations": {**body["metadata"]["annotations"], **ours}}}


def test_a_run_has_one_key_for_each_generation_and_each_rerun_text(body: dict[str, Any]) -> None:
    assert Wish.of(body).key == "u-1:3:"
    assert Wish.of(annotated(body, rerun="with new data")).key == "u-1:3:with new data"
    long = Wish.of(annotated(body, rerun="x" * 5000)).key
    assert len(long) < 100
    assert long != Wish.of(annotated(body, rerun="x" * 5001)).key


def test_its_tags_name_the_workspace(body: dict[str, Any]) -> None:
    assert Wish.of(body).tags == ["kaito", "workspace:team/w"]


def test_runs_of_an_earlier_object_of_the_same_name_are_not_its_own(body: dict[str, Any]) -> None:
    wish = Wish.of(body)
    assert wish.owns("u-1:2:")
    assert not wish.owns("u-10:3:")
    assert not wish.owns(None)


def test_a_resumed_run_does_what_is_wished_and_an_older_one_does_not(body: dict[str, Any]) -> None:
    wish = Wish.of(body)
    assert wish.is_for("u-1:3:")
    assert wish.is_for("u-1:3::resumed-2")
    assert not wish.is_for("u-1:2:")
    assert not wish.is_for("u-1:3:again")


@pytest.mark.parametrize("said", ["true", "True"])
def test_suspend_and_pause_are_annotations(body: dict[str, Any], said: str) -> None:
    assert not Wish.of(body).suspended
    assert Wish.of(annotated(body, suspend=said)).suspended
    assert Wish.of(annotated(body, pause=said)).paused
    assert not Wish.of(annotated(body, pause="false")).paused


def test_only_the_spec_and_our_annotations_wake_the_watcher(body: dict[str, Any]) -> None:
    before = essence(body)
    assert essence({**body, "status": {"state": "Failed"}}) == before
    assert essence({**body, "metadata": {**body["metadata"], "labels": {}, "resourceVersion": "78"}}) == before
    assert essence(annotated(body, serve="true")) == before
    assert essence({**body, "metadata": {**body["metadata"], "generation": 4}}) != before
    for ours in ("suspend", "pause", "rerun"):
        assert essence(annotated(body, **{ours: "true"})) != before


def test_the_parameter_is_the_object_without_what_is_the_servers(body: dict[str, Any]) -> None:
    made = parameter(body)
    assert made["metadata"] == {
        "name": "w",
        "namespace": "team",
        "uid": "u-1",
        "generation": 3,
        "labels": {"app": "w"},
        "annotations": {"kaito-flows/serve": "false"},
    }
    assert set(made) == {"apiVersion", "kind", "metadata", "resource", "tuning"}
    del made["tuning"]["config"]
    assert not parse_workspace(made, "kubernetes").workspace.serve


def test_nobody_who_writes_a_workspace_makes_it_another_run_s_guest(body: dict[str, Any]) -> None:
    body["metadata"]["annotations"]["kaito-flows/guest-of"] = "a run elsewhere"
    assert parameter(body)["metadata"]["annotations"] == {"kaito-flows/serve": "false"}


def test_a_run_in_another_place_does_what_is_wished_as_long_as_this_one_does(body: dict[str, Any]) -> None:
    wish = Wish.of(body)
    for key in (f"{wish.key}:elsewhere-west-1", f"{wish.key}:resumed-1:elsewhere-west-1"):
        assert wish.owns(key) and wish.is_for(key)
    older = Wish.of({**body, "metadata": {**body["metadata"], "generation": 2}})
    assert wish.owns(f"{older.key}:elsewhere-west-1") and not wish.is_for(f"{older.key}:elsewhere-west-1")


def test_a_config_map_is_the_runs_to_look_for(body: dict[str, Any]) -> None:
    assert faults_of(body) == ()


def test_every_fault_is_told_but_not_at_any_length(body: dict[str, Any]) -> None:
    body["tuning"]["preset"]["name"] = "no-such-model"
    body["inference"] = {"preset": {"name": "phi-2"}}
    message = message_of(faults_of(body))
    assert "Unsupported tuning preset name no-such-model" in message
    assert "not both" in message
    body["tuning"]["input"]["urls"] = [f"ftp://example.com/{i}" for i in range(100)]
    assert len(message_of(faults_of(body))) == 1024


def test_an_examples_placeholder_is_a_fault(body: dict[str, Any]) -> None:
    body["tuning"]["output"]["image"] = "ACR_REPO_HERE.azurecr.io/a:1"
    assert "still holds the placeholder" in message_of(faults_of(body))
