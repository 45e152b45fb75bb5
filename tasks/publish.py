"""Publish: the user's tag moves to the proven adapter, and to nothing else; or the adapter goes onto their volume."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.oci.images import retag
from kaito_flows.platforms import JobSpec, Platform
from kaito_flows.reference import Reference
from kaito_flows.tasks.progress import log, relay, stage, tell
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.storage import push_secrets
from kaito_flows.tasks.tune import TunedAdapter
from kaito_flows.workspace import Workspace

VOLUME = "/mnt/target"


@task(
    name="publish",
    task_run_name="publish-{workspace.metadata.name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def publish(adapter: TunedAdapter, workspace: Workspace, platform: Platform) -> str:
    """Let the output's tag point at the adapter, or write it onto the output's volume; return its reference."""
    assert workspace.tuning is not None
    output = workspace.tuning.output
    with stage("publish"):
        # Who was changed or deleted meanwhile no longer wants this adapter under its tag.
        platform.check_known(workspace.name)
        if output.image:
            # A run may last longer than a registry's token: what the Secret holds now is what counts.
            tag = Reference.parse(output.image).tag
            retag(adapter.image, tag)
            reference = adapter.image.repository.reference(tag)
        else:
            reference = adapter.image.reference
            spec = JobSpec(
                name=f"write-{workspace.name}-{adapter.image.digest.removeprefix('sha256:')[:12]}",
                workspace=workspace.name,
                program="copy",
                arguments={"version": 1, "workspace": workspace.name, "source": reference, "target": VOLUME},
                secrets=push_secrets(workspace),
                volumes={VOLUME: output.volume_source or {}},
                writes_volumes=True,
            )
            platform.run_job(spec, relay("publish"))
            platform.forget_job(spec)
        log(f"published {reference} as {adapter.image.digest}")
        tell("publish", "published", reference=reference, digest=adapter.image.digest)
        return reference
