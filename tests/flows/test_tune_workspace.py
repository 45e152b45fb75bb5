"""The flow, for real: it trains, publishes, serves and answers; it is taken up after a kill, and does nothing twice."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import get_client

from kaito_flows.errors import KaitoFlowsError, PlanError, UnprovenError, WorkspaceError
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.oci.images import open_image, read_file
from kaito_flows.oci.layout import Layout
from kaito_flows.platforms import LocalPlatform
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import listening
from kaito_flows.workspace import load_workspace

MakeWorkspace = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def platform(home: Path) -> Iterator[LocalPlatform]:
    platform = LocalPlatform(Settings())
    yield platform
    for status in platform.statuses():
        platform.delete(status.name)


def run(path: Path, **parameters: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the flow on a file; return its facts and everything that it told."""
    told: list[dict[str, Any]] = []
    with listening(lambda stage, event: told.append({"stage": stage, **event})):
        facts = tune_workspace(**load_workspace(path, "local").as_parameters(), **parameters)
    return facts, told


def steps(told: list[dict[str, Any]]) -> list[int]:
    return [e["step"] for e in told if e["event"] == "progress" and "total" in e]


def test_a_workspace_is_tuned_published_served_and_answers(
    platform: LocalPlatform, make_workspace: MakeWorkspace
) -> None:
    facts, told = run(make_workspace())
    assert steps(told) == list(range(1, 9))
    evaluation = facts["metrics"]["evaluation"]
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]

    image = open_image(facts["adapter"]["reference"])
    assert image.digest == facts["adapter"]["digest"]
    config = json.loads(read_file(image, "data/adapter_config.json"))
    assert sorted(config["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert b"base_model:" in read_file(image, "data/README.md")

    service = platform.service("tiny")
    assert service is not None
    assert facts["service"]["url"] == service.url
    assert service.models == ("tiny-phi-3", "tiny")
    body = {"messages": [{"role": "user", "content": "Say red 0."}], "generate_kwargs": {"max_length": 64}}
    answer = httpx.post(f"{service.url}/chat", json=body, timeout=60)
    assert answer.status_code == 200
    assert isinstance(answer.json()["Result"], str)

    status = platform.read_status("tiny")
    assert status is not None
    conditions = {name: c.status for name, c in status.conditions.items()}
    assert conditions == dict.fromkeys(("ResourceReady", "JobStarted", "InferenceReady", "WorkspaceSucceeded"), "True")


def test_the_second_run_trains_nothing_and_prepares_nothing(
    platform: LocalPlatform, make_workspace: MakeWorkspace
) -> None:
    path = make_workspace()
    first, _ = run(path, serve=False)
    second, told = run(path, serve=False)
    assert steps(told) == []
    assert second["reused"]
    assert second["dataset"] == {"digest": first["dataset"]["digest"], "reused": True}
    assert second["adapter"] == first["adapter"]
    assert not (platform.home / "jobs/tiny").exists() or not list((platform.home / "jobs/tiny").glob("*/"))


def test_the_same_inputs_give_the_same_digests_on_another_machine(
    platform: LocalPlatform, make_workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_workspace()
    first, _ = run(path, serve=False)
    monkeypatch.setenv("KAITO_FLOWS_HOME", str(tmp_path / "another"))
    second, told = run(path, serve=False)
    assert steps(told), "the second home knows nothing of the first"
    assert second["dataset"]["digest"] == first["dataset"]["digest"]
    assert second["adapter"]["digest"] == first["adapter"]["digest"]
    assert second["identity"] == first["identity"]


def test_lora_is_another_identity_and_needs_no_bits(platform: LocalPlatform, make_workspace: MakeWorkspace) -> None:
    quantised, _ = run(make_workspace(), serve=False)
    plain, told = run(make_workspace(method="lora"), serve=False)
    assert steps(told)
    assert plain["identity"] != quantised["identity"]
    assert plain["adapter"]["digest"] != quantised["adapter"]["digest"]


def test_a_tuner_that_is_killed_goes_on_from_its_checkpoint_to_the_same_adapter(
    platform: LocalPlatform, make_workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that the kill comes in the middle, however slowly the events are read.
    arguments = {"max_steps": 60, "max_length": 512, "packing": False, "per_device_train_batch_size": 4}
    path = make_workspace(config={"LoraConfig": {"lora_dropout": 0.05}, "TrainingArguments": arguments})
    undisturbed, _ = run(path, serve=False)
    monkeypatch.setenv("KAITO_FLOWS_HOME", str(tmp_path / "another"))
    jobs = tmp_path / "another/jobs/tiny"
    killed = threading.Event()

    def kill(stage: str, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event.get("step") == 5 and not killed.is_set():
            killed.set()
            [folder] = jobs.glob("*/")
            os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)

    with listening(kill):
        disturbed, told = run(path, serve=False)
    assert killed.is_set()
    resumed = [e["step"] for e in told if e["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 4
    assert disturbed["adapter"]["digest"] == undisturbed["adapter"]["digest"]


def test_no_serve_stops_at_the_published_adapter(platform: LocalPlatform, make_workspace: MakeWorkspace) -> None:
    facts, _ = run(make_workspace(), serve=False)
    assert "service" not in facts
    assert platform.service("tiny") is None
    assert len(facts["samples"]) == 3
    assert all(sample["expected"] and {"messages", "base", "tuned"} < sample.keys() for sample in facts["samples"])


def test_the_users_tag_does_not_move_to_an_adapter_that_was_not_proven(
    platform: LocalPlatform, make_workspace: MakeWorkspace
) -> None:
    proven, _ = run(make_workspace(), serve=False)
    path = make_workspace(config={"TrainingArguments": {"learning_rate": 0.0}})
    with pytest.raises(UnprovenError):
        run(path, serve=False)
    tags = Layout(platform.home / "registry/localhost/test/tiny").tags()
    assert tags["latest"] == proven["adapter"]["digest"]
    status = platform.read_status("tiny")
    assert status is not None
    assert status.state == "Failed"
    assert status.conditions["WorkspaceSucceeded"].reason == "UnprovenAdapter"
    assert "unproven-adapter" in status.conditions["WorkspaceSucceeded"].message


def test_a_target_that_the_model_does_not_have_is_refused_before_anything_starts(
    platform: LocalPlatform, make_workspace: MakeWorkspace
) -> None:
    path = make_workspace(config={"LoraConfig": {"target_modules": ["no_such_proj"]}})
    with pytest.raises(KaitoFlowsError, match="no_such_proj") as caught:
        run(path)
    assert caught.value.exit_code == 2
    assert not (platform.home / "models").exists()


@pytest.mark.parametrize("section", [{"input": {"image": "a/b"}}, {"output": {"volumeSource": {"emptyDir": {}}}}])
def test_what_this_platform_cannot_do_is_said_and_nothing_is_started(
    platform: LocalPlatform, make_workspace: MakeWorkspace, section: dict[str, Any]
) -> None:
    with pytest.raises((PlanError, WorkspaceError)):
        run(make_workspace(**section))
    assert not (platform.home / "jobs").exists()


def test_the_run_shows_its_artifacts(platform: LocalPlatform, make_workspace: MakeWorkspace) -> None:
    facts, _ = run(make_workspace(), serve=False)
    with get_client(sync_client=True) as client:
        response = client._client.post("/artifacts/filter", json={})
    shown = {a["key"]: a for a in response.json() if a["flow_run_id"] == facts["flow_run_id"]}
    assert {"plan", "dataset-report", "tuning-progress", "tuning-report", "workspace-status"} <= set(shown)
    assert "data:image/svg+xml;base64," in shown["tuning-report"]["data"]
    assert float(shown["tuning-progress"]["data"]) == 100.0
    assert "RESOURCEREADY" in shown["workspace-status"]["data"]
