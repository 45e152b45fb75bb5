"""Tune: one job, taken up where it is when the run comes again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import PreparedDataset
from kaito_flows.errors import ImageError
from kaito_flows.nodes import NodeLease
from kaito_flows.oci.images import Image, open_image, read_file
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import Event, JobSpec, Platform
from kaito_flows.tasks.artifacts import ProgressArtifact
from kaito_flows.tasks.progress import log, relay, stage, tell
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable


@dataclass(frozen=True, slots=True)
class TunedAdapter:
    """An adapter that was proven: its image, what was measured, its loss history, and whether this run trained it."""

    image: Image
    metrics: dict[str, Any]
    history: tuple[Event, ...]
    reused: bool


@task(
    name="tune",
    task_run_name="tune-{plan.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def tune(plan: Plan, dataset: PreparedDataset, lease: NodeLease, weights: Path, platform: Platform) -> TunedAdapter:
    """Train, or find the adapter that a run with the same identity has published."""
    with stage("tune", doing=plan.method):
        platform.check_known(plan.workspace)
        output = f"oci:{dataset.image.layout.root}:run-{plan.identity[:12]}"
        if (found := _published(output, plan.identity)) is not None:
            log(f"already tuned with the same inputs: {found.digest}")
            tell("tune", "reused", digest=found.digest)
            return TunedAdapter(found, *_measured(found), reused=True)
        progress = ProgressArtifact("tuning-progress", f"Training of {plan.workspace}")
        pass_on = relay("tune")

        def on_event(event: Event) -> None:
            pass_on(event)
            if event["event"] == "progress":
                progress.update(event["step"], event["total"])

        log(f"training on {', '.join(lease.nodes)}")
        spec = JobSpec(
            name=f"tune-{plan.identity[:12]}",
            workspace=plan.workspace,
            program="tuner",
            arguments={
                "version": 1,
                "workspace": plan.workspace,
                "identity": plan.identity,
                "method": plan.method,
                "model": plan.model,
                "dataset": dataset.image.reference,
                "output": output,
            },
            files={"mnt/config/training_config.yaml": plan.config_yaml},
            links={"workspace/weights": weights},
        )
        platform.run_job(spec, on_event)
        image = open_image(output)
        platform.forget_job(spec)
        return TunedAdapter(image, *_measured(image), reused=False)


def _published(output: str, identity: str) -> Image | None:
    try:
        image = open_image(output)
    except ImageError:
        return None
    same = image.annotations.get("io.kaito-flows.identity") == identity
    return image if same and image.layout.has(image.digest) else None


def _measured(image: Image) -> tuple[dict[str, Any], tuple[Event, ...]]:
    metrics: dict[str, Any] = json.loads(read_file(image, "data/metrics.json"))
    return metrics, tuple(metrics.get("history", ()))
