"""Fetch the base model, once for all workspaces."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.platforms import Platform
from kaito_flows.presets.loader import Preset
from kaito_flows.tasks.progress import log, relay, stage
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable


@task(
    name="fetch-weights",
    task_run_name="fetch-weights-{preset.name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def fetch_weights(preset: Preset, platform: Platform) -> Path:
    """Return the folder that holds the model and its tokenizer."""
    with stage("fetch weights"):
        source = preset.source.model_dump(mode="json", exclude_none=True)
        folder = platform.ensure_weights(preset.name, source, relay("fetch weights"))
        log(f"model folder: {folder}")
        return folder
