"""Publishing: the tag moves for a Workspace that still wants it, and for no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_flows.errors import RunError
from kaito_flows.oci.images import build_image
from kaito_flows.platforms import LocalPlatform
from kaito_flows.settings import Settings
from kaito_flows.tasks.publish import publish
from kaito_flows.tasks.tune import TunedAdapter
from kaito_flows.workspace import WorkspaceV1beta1
from kaito_flows.workspace.status import WorkspaceStatus

IMAGE = "localhost/test/tiny:latest"


def test_the_tag_moves_only_for_a_workspace_that_is_still_there(home: Path) -> None:
    platform = LocalPlatform(Settings())
    repository = platform.repository(IMAGE)
    image = build_image(repository, [{"data/x": b"x"}], annotations={}, tag="run-1")
    adapter = TunedAdapter(image, {}, (), reused=False)
    workspace = WorkspaceV1beta1.model_validate(
        {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": "tiny"},
            "resource": {"labelSelector": {"matchLabels": {"app": "tiny"}}},
            "tuning": {
                "preset": {"name": "tiny-phi-3"},
                "method": "lora",
                "input": {"urls": ["file:x.json"]},
                "output": {"image": IMAGE},
            },
        }
    )
    platform.write_status(WorkspaceStatus("tiny", "kaito.sh/v1beta1", ""))
    platform.delete("tiny")
    with pytest.raises(RunError) as deleted:
        publish.fn(adapter, workspace, platform)
    assert deleted.value.code == "workspace-deleted"
    assert sorted(repository.tags()) == ["run-1"]

    platform.write_status(WorkspaceStatus("tiny", "kaito.sh/v1beta1", ""))
    publish.fn(adapter, workspace, platform)
    assert repository.tags()["latest"] == image.digest
