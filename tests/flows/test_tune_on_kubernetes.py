"""The flow on a real cluster: pods tune, push, serve; who is killed is taken up; who is at fault is told why."""

from __future__ import annotations

from typing import Any

import pytest
from pod_fixtures import Place, chats_image, training_config, workspace

from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.tasks.progress import listening
from kaito_flows.workspace import WorkspaceV1beta1

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]


def run(document: dict[str, Any], **parameters: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the flow on a Workspace; return its facts and everything that it told."""
    told: list[dict[str, Any]] = []
    with listening(lambda stage, event: told.append({"stage": stage, **event})):
        facts = tune_workspace(WorkspaceV1beta1.model_validate(document), **parameters)
    return facts, told


def test_a_workspace_is_tuned_in_a_pod_and_served_by_another(place: Place) -> None:
    document = workspace(place, "tiny", chats_image(place), config=training_config(place))
    place.kubectl("apply", "-f", "-", stdin=document)
    facts, _ = run(document)
    assert facts["service"]["models"] == ["tiny-phi-3", "tiny"]
