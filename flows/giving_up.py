"""What is left to do when a run was cancelled: it has no say any more, and another process acts for it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from kaito_flows.nodes import Holder, open_nodes
from kaito_flows.platforms import open_platform
from kaito_flows.settings import Settings
from kaito_flows.tasks.elsewhere import stop_elsewhere
from kaito_flows.tasks.status import tell_stopped
from kaito_flows.workspace.spec import GUEST_ANNOTATION


def give_up(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Stop the jobs of the run, here and elsewhere, by the Workspace's name alone, and give its nodes back."""
    metadata, settings = flow_run.parameters["workspace"]["metadata"], Settings()
    is_guest = GUEST_ANNOTATION in (metadata.get("annotations") or {})
    nodes = open_nodes(settings)
    namespace = (settings.namespace if is_guest else "") or metadata.get("namespace", "")
    platform = open_platform(settings, namespace, str(flow_run.id))
    with ExitStack() as left:  # all of it is done, whatever becomes of the rest
        left.callback(nodes.release, Holder(platform.namespace, metadata["name"], str(flow_run.id)))
        if is_guest:
            left.callback(platform.delete, metadata["name"])
        elif settings.elsewhere:
            left.callback(stop_elsewhere, flow_run.id)
        platform.stop_jobs(metadata["name"])
        tell_stopped(metadata["name"], str(flow_run.id), platform)
