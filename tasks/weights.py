"""Fetch the base model, once for all workspaces; where pods bring it themselves, its tokenizer alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.planning.plan import Plan
from kaito_flows.planning.serving import ServingPlan
from kaito_flows.platforms import Platform, Weights
from kaito_flows.presets.loader import ImageSource
from kaito_flows.reference import Reference
from kaito_flows.tasks.progress import log, relay, stage
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.spec import PresetOptions

AnyPlan = TypeVar("AnyPlan", Plan, ServingPlan)


def weights_of(plan: Plan | ServingPlan, workspace: Workspace) -> Weights:
    """The base model of a plan, with the Secrets that the Workspace names for it.

    Its size in memory is two bytes a parameter.
    """
    section = workspace.tuning or workspace.inference
    options = section.preset.preset_options if section and section.preset else PresetOptions()
    return Weights(
        plan.preset.name,
        plan.preset.source.model_dump(mode="json", exclude_none=True),
        2 * plan.preset.parameters.total,
        secret=getattr(options, "model_access_secret", ""),
        pull_secrets=tuple(options.image_pull_secrets),
    )


def pin_weights(plan: AnyPlan, workspace: Workspace, platform: Platform) -> AnyPlan:
    """Return the plan with the base model's image by its digest, if it comes from one in a registry.

    A tag may move: what was tuned, and what nodes keep of a model, would then be another model's.

    Raises:
        ImageError: there is no such image.
        AccessError, RegistryError: the registry says no, or does not answer.
    """
    source = plan.preset.source
    if not isinstance(source, ImageSource) or platform.kind == "local":
        return plan
    reference = Reference.parse(source.image)
    repository = platform.repository(source.image, weights_of(plan, workspace).pull_secrets)
    digest = repository.resolve(reference.digest or reference.tag)
    return replace(plan, preset=plan.preset.from_image(repository.reference(digest)))


@task(
    name="fetch-weights",
    task_run_name="fetch-weights-{weights.preset}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def fetch_weights(weights: Weights, platform: Platform) -> Path:
    """Return the folder that holds the model's tokenizer and, where jobs run on this machine, the model."""
    with stage("fetch weights"):
        folder = platform.ensure_weights(weights, relay("fetch weights"))
        log(f"model folder: {folder}")
        return folder
