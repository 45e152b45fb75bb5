"""Prepare the dataset: fetched, tokenised, split and packed on a CPU, while nodes boot."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import DatasetParameters, PreparedDataset, fetch, prepare_dataset
from kaito_flows.errors import PlanError
from kaito_flows.oci.images import read_file
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import Platform
from kaito_flows.tasks.artifacts import show_markdown
from kaito_flows.tasks.progress import log, stage, tell
from kaito_flows.workspace import WorkspaceFile


@task(name="prepare-dataset", task_run_name="prepare-dataset-{plan.workspace}", cache_policy=NO_CACHE)
def prepare(file: WorkspaceFile, plan: Plan, weights: Path, platform: Platform) -> PreparedDataset:
    """Return the dataset image, made now or found by its key, and show its report."""
    tuning = file.workspace.tuning
    if tuning is None or file.training_config is None:
        raise PlanError("no tuning section", place="tuning")
    with stage("prepare dataset"):
        sources = fetch(tuning.input.urls, platform.downloads, allow_files=True)
        layout = platform.repository(tuning.output.image)
        dataset = prepare_dataset(sources, weights, DatasetParameters.from_config(plan.config), layout)
        tell(
            "prepare dataset", "dataset", reused=dataset.reused, digest=dataset.image.digest, **dataset.facts["splits"]
        )
        log(f"dataset {dataset.image.digest} ({'found' if dataset.reused else 'made'})")
        report = read_file(dataset.image, "data/report.md").decode()
        show_markdown("dataset-report", report, f"Dataset of {plan.workspace}")
        return dataset
