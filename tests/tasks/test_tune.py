"""What a plan says of the tuning job reaches the job file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.program import strict
from kaito_flows.containers.tuner.job import Estimate, TunerJob
from kaito_flows.dataset import PreparedDataset
from kaito_flows.oci.images import build_image
from kaito_flows.oci.layout import Layout
from kaito_flows.planning.plan import DatasetFacts, plan_workspace
from kaito_flows.platforms import LocalPlatform, Placement
from kaito_flows.settings import Settings
from kaito_flows.tasks.tune import job_of
from kaito_flows.workspace import parse_workspace

WORKSPACE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "w"},
    "resource": {"labelSelector": {"matchLabels": {"a": "b"}}, "count": 2},
    "tuning": {
        "preset": {"name": "tiny-phi-3"},
        "method": "lora",
        "input": {"urls": ["https://example.com/a.parquet"]},
        "output": {"image": "r.example/w:1", "imagePushSecret": "push"},
    },
}


@pytest.mark.parametrize("divided", [False, True])
def test_a_model_that_fits_only_in_parts_is_divided_by_the_tuner(tmp_path: Path, divided: bool) -> None:
    file = parse_workspace(WORKSPACE, "kubernetes")
    plan = plan_workspace(file, "kubernetes").with_dataset(DatasetFacts("sha256:0", 10, 100, 2, 20, 1024))
    plan = replace(plan, place=replace(plan.place, divided=divided))
    repository = Layout(tmp_path / "registry")
    dataset = PreparedDataset(build_image(repository, [{"data/a": b"a"}], annotations={}), {}, reused=False)
    platform = LocalPlatform(Settings(home=tmp_path))
    spec = job_of(plan, dataset, Placement(count=2), file.workspace, platform, repository, "run-1")
    job = strict(TunerJob, spec.job_file("/"), place="job.json")
    assert job.shard is divided
    assert job.memory == Estimate(plan.memory.needed, plan.memory.kept_block)
