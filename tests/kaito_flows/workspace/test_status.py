"""The status of a Workspace: conditions as Kubernetes keeps them, columns as KAITO prints them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from kaito_flows.workspace.status import (
    WORKSPACE_SUCCEEDED,
    WorkspaceStatus,
    columns,
    cost_words,
    reason_of,
    status_of_resource,
    status_resource,
)

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


def test_an_adapter_on_a_volume_has_a_digest_and_no_image() -> None:
    made = status()
    made.facts["adapter"] = {"reference": "docker://r/work@sha256:0", "image": "", "digest": "sha256:0"}
    assert status_resource(made)["adapter"] == {"digest": "sha256:0"}, "an empty text is null to older API servers"


def test_a_status_is_json_and_comes_back_the_same() -> None:
    made = status()
    assert WorkspaceStatus.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_a_status_comes_back_from_the_workspaces_object_as_it_was() -> None:
    made = WorkspaceStatus("w", "kaito.sh/v1beta1", "Standard_X", "2026-11-24T00:00:00Z", generation=3, node_count=2)
    made.state = "Running"
    made.set(WORKSPACE_SUCCEEDED, "False", "workspacePending", "tune: train", now="2026-11-24T00:00:01Z")
    made.facts = {
        "flow_run_id": "f", "identity": "i", "step": 3, "steps": 8, "loss": 1.5, "nodes": ["a"],
        "adapter": {"image": "r/i:t", "digest": "sha256:0"}, "service": {"url": "http://w.ns.svc"},
        "cost": {
            "usd": 1.25, "gpu_hours": 0.5, "training_share": 0.9, "paid_seconds": 1800.0, "boot_seconds": 240.0
        },
    }  # fmt: skip
    found = {
        "apiVersion": "kaito.sh/v1beta1",
        "metadata": {"name": "w", "generation": 3, "creationTimestamp": "2026-11-24T00:00:00Z"},
        "resource": {"instanceType": "Standard_X", "count": 2},
        "status": status_resource(made),
    }
    assert status_of_resource(found) == made


def test_a_cost_is_told_in_kubernetes_words_and_on_a_line_for_people() -> None:
    cost = {"usd": 1.254, "gpu_hours": 0.5, "training_share": None, "paid_seconds": 1800.0, "boot_seconds": 240.0}
    made = status("kaito.sh/v1beta1")
    made.facts["cost"] = cost
    found = status_resource(made)
    assert found["cost"] == {"usd": 1.254, "gpuHours": 0.5, "paidSeconds": 1800.0, "bootSeconds": 240.0}
    metadata = {"name": "w", "generation": 1, "creationTimestamp": made.created}
    again = status_of_resource({"apiVersion": "kaito.sh/v1beta1", "metadata": metadata, "status": found})
    assert again.facts["cost"] == cost
    assert cost_words(cost) == "1.25 USD, 0.50 GPU hours, 4m until the nodes were ready"
    shared = cost_words({**cost, "training_share": 0.913})
    assert shared == "1.25 USD, 0.50 GPU hours, 91% of the paid time training, 4m until the nodes were ready"


def test_what_an_older_api_server_would_take_for_null_is_never_written() -> None:
    made = WorkspaceStatus("w", "kaito.sh/v1beta1", "")
    made.set(WORKSPACE_SUCCEEDED, "True", "workspaceSucceeded")
    [condition] = status_resource(made)["conditions"]
    assert condition["message"] == "workspaceSucceeded"


def test_an_errors_code_becomes_a_reason_that_kubernetes_takes() -> None:
    assert reason_of("out-of-memory") == "OutOfMemory"
    assert reason_of("no-node") == "NoNode"
