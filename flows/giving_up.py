"""What is left to do when a run was cancelled: it has no say any more, and another process acts for it."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from kaito_flows.nodes import Holder, open_nodes
from kaito_flows.platforms import open_platform
from kaito_flows.settings import Settings
from kaito_flows.tasks.status import tell_stopped


def give_up(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the jobs of the run, by the Workspace's name alone, and give its nodes back."""
    metadata, settings = flow_run.parameters["workspace"]["metadata"], Settings()
    nodes = open_nodes(settings)
    platform = open_platform(settings, metadata.get("namespace", ""), str(flow_run.id))
    try:
        platform.stop_jobs(metadata["name"])
        tell_stopped(metadata["name"], str(flow_run.id), platform)
    finally:
        nodes.release(Holder(platform.namespace, metadata["name"], str(flow_run.id)))
