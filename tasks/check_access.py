"""Check access: what could fail late is asked for early, while nothing has been started."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import probe
from kaito_flows.errors import DiskFullError, Fault, PlanError, WorkspaceError
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import Platform
from kaito_flows.tasks.progress import log, stage
from kaito_flows.workspace import WorkspaceFile


@task(name="check-access", task_run_name="check-access-{plan.workspace}", cache_policy=NO_CACHE)
def check_access(file: WorkspaceFile, plan: Plan, platform: Platform, port: int | None) -> None:
    """Raise now what would else fail after the training: placeholders, data, disk, port."""
    with stage("check access"):
        _refuse(file.placeholders)
        tuning = file.workspace.tuning
        if tuning is None:
            raise PlanError(
                "only tuning Workspaces can be run on this platform", place="inference", code="not-supported"
            )
        for path, given in (
            ("tuning.input.volumeSource", tuning.input.volume_source),
            ("tuning.input.image", tuning.input.image),
            ("tuning.output.volumeSource", tuning.output.volume_source),
        ):
            if given:
                hint = "on this machine, use input.urls and output.image"
                raise PlanError("is not supported on this machine", place=path, hint=hint, code="not-supported")
        sizes = probe(tuning.input.urls, allow_files=True)
        log(f"dataset: {sum(size or 0 for size in sizes):,} bytes in {len(sizes)} file(s)")
        platform.check_service(plan.workspace, port)
        _check_disk(platform, plan)


def _refuse(placeholders: Sequence[Fault]) -> None:
    if placeholders:
        raise WorkspaceError(placeholders)


def _check_disk(platform: Platform, plan: Plan) -> None:
    source = plan.preset.source.model_dump(mode="json", exclude_none=True)
    needed = plan.run_disk_bytes if platform.has_weights(plan.preset.name, source) else plan.disk_bytes
    if (free := platform.free_bytes()) < needed:
        raise DiskFullError(
            f"{free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB needed",
            place="KAITO_FLOWS_HOME",
            hint="free some space, or set KAITO_FLOWS_HOME elsewhere",
        )
