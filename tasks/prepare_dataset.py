"""Prepare the dataset: fetched, tokenised, split and packed on a CPU, while nodes boot."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.canonical import canonical_digest
from kaito_flows.dataset import DatasetParameters, PreparedDataset, SourceFile, fetch, files_of_image, prepare_dataset
from kaito_flows.errors import PlanError
from kaito_flows.oci.images import find_image, read_file
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import JobSpec, Placement, Platform
from kaito_flows.reference import Reference
from kaito_flows.tasks.artifacts import show_markdown
from kaito_flows.tasks.progress import log, relay, stage, tell
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.storage import push_secrets, repository_of
from kaito_flows.workspace import Workspace, WorkspaceFile

VOLUME = "/mnt/source"


@task(
    name="prepare-dataset",
    task_run_name="prepare-dataset-{plan.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def prepare(file: WorkspaceFile, plan: Plan, weights: Path, platform: Platform) -> PreparedDataset:
    """Return the dataset image, made now or found by its key, and show its report."""
    if file.workspace.tuning is None or file.training_config is None:
        raise PlanError("no tuning section", place="tuning")
    with stage("prepare dataset"):
        sources = _sources(file.workspace, platform)
        repository = repository_of(file.workspace, platform)
        dataset = prepare_dataset(sources, weights, DatasetParameters.from_config(plan.config), repository)
        tell(
            "prepare dataset", "dataset", reused=dataset.reused, digest=dataset.image.digest, **dataset.facts["splits"]
        )
        log(f"dataset {dataset.image.digest} ({'found' if dataset.reused else 'made'})")
        report = read_file(dataset.image, "data/report.md").decode()
        show_markdown("dataset-report", report, f"Dataset of {plan.workspace}")
        return dataset


def _sources(workspace: Workspace, platform: Platform) -> tuple[SourceFile, ...]:
    """The dataset's files, here: behind URLs, in an image, or on a volume, which a pod packs into an image first."""
    assert workspace.tuning is not None
    given = workspace.tuning.input
    if given.urls:
        return fetch(given.urls, platform.downloads, allow_files=platform.kind == "local")
    if given.image:
        reference = Reference.parse(given.image)
        repository = platform.repository(given.image, given.image_pull_secrets)
        return files_of_image(find_image(repository, reference.digest or reference.tag), platform.downloads)
    repository = repository_of(workspace, platform)
    tag = f"data-{workspace.name[:63]}-{canonical_digest(given.volume_source)[:12]}"
    spec = JobSpec(
        name=f"read-{workspace.name}",
        workspace=workspace.name,
        program="copy",
        arguments={"version": 1, "workspace": workspace.name, "source": VOLUME, "target": repository.reference(tag)},
        placement=Placement(),
        secrets=push_secrets(workspace),
        volumes={VOLUME: given.volume_source or {}},
    )
    platform.run_job(spec, relay("prepare dataset"))
    image = find_image(repository, tag)
    platform.forget_job(spec)
    return files_of_image(image, platform.downloads)
