"""Provision nodes before the training, and release them on every way out."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.nodes import NodeLease, NodeProvider
from kaito_flows.planning.plan import Plan
from kaito_flows.tasks.progress import log, stage


@task(name="provision-nodes", task_run_name="provision-nodes-{plan.workspace}", cache_policy=NO_CACHE)
def provision_nodes(plan: Plan, nodes: NodeProvider) -> NodeLease:
    """Lease the nodes that the plan asks for."""
    with stage("provision nodes"):
        lease = nodes.lease(plan.workspace, plan.instance_type or "")
        log(f"nodes: {', '.join(lease.nodes)} ({lease.provider})")
        return lease


@task(name="release-nodes", task_run_name="release-nodes-{lease.workspace}", cache_policy=NO_CACHE)
def release_nodes(lease: NodeLease, nodes: NodeProvider) -> None:
    """Give the nodes back."""
    nodes.release(lease)
