"""Provision nodes before the training, and release them on every way out."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.nodes import NodeLease, NodeProvider, NodeRequest
from kaito_flows.tasks.progress import log, stage
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable


@task(
    name="provision-nodes",
    task_run_name="provision-nodes-{request.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def provision_nodes(request: NodeRequest, nodes: NodeProvider) -> NodeLease:
    """Lease the nodes that the Workspace asks for."""
    with stage("provision nodes"):
        lease = nodes.lease(request)
        log(f"nodes: {', '.join(lease.nodes)} ({lease.provider})")
        return lease


@task(name="release-nodes", task_run_name="release-nodes-{lease.workspace}", cache_policy=NO_CACHE)
def release_nodes(lease: NodeLease, nodes: NodeProvider) -> None:
    """Give the nodes back."""
    nodes.release(lease)
