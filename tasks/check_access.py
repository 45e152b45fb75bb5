"""Check access: what could fail late is asked for early, while nothing has been started."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import probe
from kaito_flows.errors import DiskFullError, Fault, PlanError, WorkspaceError
from kaito_flows.oci.images import find_image
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import Platform
from kaito_flows.reference import Reference
from kaito_flows.tasks.progress import log, stage
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.storage import push_secrets, repository_of
from kaito_flows.tasks.weights import weights_of
from kaito_flows.workspace import WorkspaceFile
from kaito_flows.workspace.spec import TuningSpec


@task(
    name="check-access",
    task_run_name="check-access-{plan.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def check_access(file: WorkspaceFile, plan: Plan, platform: Platform, port: int | None) -> None:
    """Raise now what would else fail after the training: placeholders, secrets, rights, data, disk, port."""
    with stage("check access"):
        _refuse(file.placeholders)
        tuning = file.workspace.tuning
        if tuning is None:
            raise PlanError("it tunes nothing", place="tuning", hint="serve-workspace serves it", code="not-supported")
        if platform.kind == "local":
            _refuse_volumes(tuning)
        weights = weights_of(plan, file.workspace)
        pull_secrets = tuning.input.image_pull_secrets
        secrets = (*push_secrets(file.workspace), *pull_secrets, *weights.pull_secrets)
        platform.check_secrets(secrets, hub=weights.secret)
        if tuning.output.image:
            platform.check_output(plan.workspace, tuning.output.image)
        repository_of(file.workspace, platform).probe_push()
        if tuning.input.image:
            tag = Reference.parse(tuning.input.image)
            image = find_image(platform.repository(tuning.input.image, pull_secrets), tag.digest or tag.tag)
            log(f"dataset: {tuning.input.image} is {image.digest}")
        elif tuning.input.urls:
            sizes = probe(tuning.input.urls, allow_files=platform.kind == "local")
            log(f"dataset: {sum(size or 0 for size in sizes):,} bytes in {len(sizes)} file(s)")
        platform.check_service(plan.workspace, port)
        needed = plan.run_disk_bytes if platform.has_weights(weights) else plan.disk_bytes
        if (free := platform.free_bytes()) < needed:
            raise DiskFullError(
                f"{free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB needed",
                place="KAITO_FLOWS_HOME",
                hint="free some space, or set KAITO_FLOWS_HOME elsewhere",
            )


def _refuse(placeholders: Sequence[Fault]) -> None:
    if placeholders:
        raise WorkspaceError(placeholders)


def _refuse_volumes(tuning: TuningSpec) -> None:
    for path, given in (
        ("tuning.input.volumeSource", tuning.input.volume_source),
        ("tuning.input.image", tuning.input.image),
        ("tuning.output.volumeSource", tuning.output.volume_source),
    ):
        if given:
            hint = "on this machine, use input.urls and output.image"
            raise PlanError("is not supported on this machine", place=path, hint=hint, code="not-supported")
