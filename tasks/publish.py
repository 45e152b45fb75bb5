"""Publish: the user's tag moves to the proven adapter, and to nothing else."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.oci.images import retag
from kaito_flows.reference import Reference
from kaito_flows.tasks.progress import log, stage, tell
from kaito_flows.tasks.tune import TunedAdapter


@task(name="publish", task_run_name="publish-{output}", cache_policy=NO_CACHE)
def publish(adapter: TunedAdapter, output: str) -> str:
    """Let the tag of `output` point at the adapter; return the reference by digest that skopeo reads."""
    with stage("publish"):
        tag = Reference.parse(output).tag
        retag(adapter.image, tag)
        reference = f"oci:{adapter.image.layout.root}:{tag}"
        log(f"published {reference} as {adapter.image.digest}")
        tell("publish", "published", reference=reference, digest=adapter.image.digest)
        return reference
