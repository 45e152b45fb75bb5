"""Tune: one job, taken up where it is when the run comes again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.dataset import PreparedDataset
from kaito_flows.errors import ImageError, KaitoFlowsError
from kaito_flows.nodes import NodeLease
from kaito_flows.oci.images import Image, find_image, read_file
from kaito_flows.oci.repository import Repository
from kaito_flows.planning.plan import Plan
from kaito_flows.platforms import Event, JobSpec, Placement, Platform
from kaito_flows.settings import Settings
from kaito_flows.tasks.artifacts import ProgressArtifact
from kaito_flows.tasks.measured import keep_memory_share
from kaito_flows.tasks.progress import log, relay, stage, tell
from kaito_flows.tasks.provision_nodes import Tenancy
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.storage import push_secrets, repository_of
from kaito_flows.tasks.weights import weights_of
from kaito_flows.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TunedAdapter:
    """An adapter that was proven: its image, what was measured, its loss history, and whether this run trained it.

    `training_seconds` were spent in steps, by this run or by those whose checkpoints it went on from. `samples` are
    answers of the base model and of the adapter to the same prompts, if this run heard them.
    """

    image: Image
    metrics: dict[str, Any]
    history: tuple[Event, ...]
    reused: bool
    training_seconds: float = 0.0
    samples: tuple[dict[str, Any], ...] = ()


@task(
    name="tune",
    task_run_name="tune-{plan.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def tune(
    plan: Plan,
    dataset: PreparedDataset,
    tenancy: Tenancy,
    workspace: Workspace,
    platform: Platform,
    on_lease: Callable[[NodeLease], None],
) -> TunedAdapter:
    """Train, or find the adapter that a run with the same identity has published.

    Nodes that are taken away are replaced by others, on which the job goes on; `on_lease` hears of the first and of
    those.
    """
    with stage("tune", doing=plan.method):
        platform.check_known(plan.workspace)
        repository = repository_of(workspace, platform)
        tag = f"run-{plan.identity[:12]}"
        if (found := published(repository, tag, plan.identity)) is not None:
            log(f"already tuned with the same inputs: {found.digest}")
            tell("tune", "reused", digest=found.digest)
            return TunedAdapter(found, *_measured(found), reused=True)
        tenancy.check_estimate(plan.cost_usd or 0.0)
        progress = ProgressArtifact("tuning-progress", f"Training of {plan.workspace}")
        pass_on = relay("tune")

        samples: list[dict[str, Any]] = []

        def on_event(event: Event) -> None:
            if event["event"] == "samples":
                samples[:] = event["samples"]
                return
            pass_on(event)
            if event["event"] == "progress" and "total" in event:
                progress.update(event["step"], event["total"])

        while True:
            lease = tenancy.lease()
            on_lease(lease)
            log(f"training on {', '.join(lease.nodes)}")
            placement = Placement(lease.nodes, lease.gpus, tenancy.request.count)
            spec = job_of(plan, dataset, placement, workspace, platform, repository, tag)
            try:
                completed = platform.run_job(spec, on_event)
                break
            except KaitoFlowsError as exc:
                tenancy.check_budget()
                if not exc.retryable or not tenancy.is_lost():
                    raise
                log(f"{exc}: it goes on elsewhere", warning=True)
        image = find_image(repository_of(workspace, platform), tag)
        platform.forget_job(spec)
        timings, (metrics, history) = completed.get("timings", {}), _measured(image)
        keep_memory_share(plan, timings, history)
        seconds = float(timings.get("steps_seconds", 0.0))
        return TunedAdapter(image, metrics, history, reused=False, training_seconds=seconds, samples=tuple(samples))


def job_of(
    plan: Plan,
    dataset: PreparedDataset,
    placement: Placement,
    workspace: Workspace,
    platform: Platform,
    repository: Repository,
    tag: str,
) -> JobSpec:
    """The tuning job of a plan, whose adapter goes under that tag."""
    memory = plan.memory
    arguments: dict[str, Any] = {
        "version": 1,
        "workspace": plan.workspace,
        "identity": plan.identity,
        "method": plan.method,
        "model": plan.model,
        "dataset": dataset.image.reference,
        "output": repository.reference(tag),
        "shard": plan.shard,
    }
    if platform.kind == "kubernetes":
        # A pod's folder goes with the pod: what it would go on from lies in the registry.
        arguments["checkpoints"] = repository.reference(f"checkpoint-{plan.identity[:12]}")
        arguments["checkpoint_seconds"] = Settings().checkpoint_seconds
    return JobSpec(
        name=f"tune-{plan.workspace}-{plan.identity[:12]}",
        workspace=plan.workspace,
        program="tuner",
        arguments=arguments,
        files={"mnt/config/training_config.yaml": plan.config_yaml},
        weights=weights_of(plan, workspace),
        placement=placement,
        secrets=push_secrets(workspace),
        memory={"needed": memory.needed, "kept_block": memory.kept_block} if memory.kept_block else None,
        expected_seconds=plan.seconds,
    )


def published(repository: Repository, tag: str, identity: str) -> Image | None:
    """Return the whole adapter that a run with that identity has published, if there is one."""
    try:
        image = find_image(repository, tag)
    except ImageError:
        return None
    same = image.annotations.get("io.kaito-flows.identity") == identity
    return image if same and repository.has(image.digest) else None


def _measured(image: Image) -> tuple[dict[str, Any], tuple[Event, ...]]:
    metrics: dict[str, Any] = json.loads(read_file(image, "data/metrics.json"))
    return metrics, tuple(metrics.get("history", ()))
