"""The status that a run keeps: what is true of this run and not of the last, and its first failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_flows.errors import ClusterError, DivergedError
from kaito_flows.platforms import LocalPlatform
from kaito_flows.settings import Settings
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.status import keeping_status, tell_stopped
from kaito_flows.workspace import WorkspaceV1beta1
from kaito_flows.workspace.status import INFERENCE_READY, JOB_STARTED, RESOURCE_READY, WORKSPACE_SUCCEEDED

WORKSPACE = WorkspaceV1beta1.model_validate(
    {"metadata": {"name": "w"}, "resource": {"labelSelector": {}}, "inference": {"template": {"spec": {}}}}
)


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables that the UI would be given: there is no server here."""
    keys: list[str] = []
    monkeypatch.setattr(artifacts, "show_table", lambda key, rows, description: keys.append(key))
    return keys


@pytest.fixture
def platform(home: Path) -> LocalPlatform:
    return LocalPlatform(Settings())


def test_what_was_true_of_the_last_run_is_not_of_a_new_one(platform: LocalPlatform) -> None:
    with keeping_status(WORKSPACE, platform) as status:
        for condition in (RESOURCE_READY, JOB_STARTED, INFERENCE_READY):
            status.set(condition, "True", "r")
        status.facts |= {"step": 8, "adapter": {"image": "i", "digest": "d"}, "flow_run_id": "an earlier run"}
    with keeping_status(WORKSPACE, platform):
        begun = platform.read_status("w")
    assert begun is not None
    assert begun.state == "Running"
    assert "step" not in begun.facts
    assert begun.facts["adapter"]["digest"] == "d", "what was published is published"
    assert {name: c.status for name, c in begun.conditions.items()} == {
        RESOURCE_READY: "False", INFERENCE_READY: "False", WORKSPACE_SUCCEEDED: "False"
    }  # fmt: skip


def test_a_failure_is_told_even_where_cleaning_up_fails_too(
    platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(workspace: str) -> list[str]:
        raise ClusterError("does not answer")

    monkeypatch.setattr(platform, "stop_jobs", away)
    with pytest.raises(DivergedError), keeping_status(WORKSPACE, platform):
        raise DivergedError("the loss is nan")
    status = platform.read_status("w")
    assert status is not None
    assert (status.state, status.conditions[WORKSPACE_SUCCEEDED].reason) == ("Failed", "Diverged")


def test_a_cancellation_is_told_unless_something_else_was_told_since(platform: LocalPlatform) -> None:
    with keeping_status(WORKSPACE, platform) as status:
        status.facts["flow_run_id"] = "run"
        platform.write_status(status)
        tell_stopped("w", "another run", platform)
        assert platform.read_status("w").state == "Running"  # type: ignore[union-attr]
        tell_stopped("w", "run", platform)
        assert platform.read_status("w").state == "Stopped"  # type: ignore[union-attr]
        status.set(WORKSPACE_SUCCEEDED, "False", "workspacePaused", "annotation")
        platform.write_status(status)
        tell_stopped("w", "run", platform)
        assert platform.read_status("w").conditions[WORKSPACE_SUCCEEDED].reason == "workspacePaused"  # type: ignore[union-attr]
