"""Check access: what could fail late is asked for early, while nothing has been started."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import probe
from kaito_flows.errors import DiskFullError, Fault, PlanError, WorkspaceError
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import LocalPlatform
from kaito_flows.tasks.progress import log, stage
from kaito_flows.workspace import WorkspaceFile


@task(name="check-access", task_run_name="check-access-{plan.workspace}", cache_policy=NO_CACHE)
def check_access(file: WorkspaceFile, plan: Plan, platform: LocalPlatform, port: int | None) -> None:
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
        platform.check_port(plan.workspace, port)
        _check_disk(platform, plan)


def _refuse(placeholders: Sequence[Fault]) -> None:
    if placeholders:
        raise WorkspaceError(placeholders)


def _check_disk(platform: LocalPlatform, plan: Plan) -> None:
    platform.home.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(platform.home).free, plan.disk_bytes
    if free < needed:
        raise DiskFullError(
            f"{free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB needed",
            place=str(platform.home),
            hint="free some space, or set KAITO_FLOWS_HOME elsewhere",
        )
