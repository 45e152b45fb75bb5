"""The flow `serve-workspace`: from an inference Workspace to a service that answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import flow
from prefect.runtime import flow_run as current_run

from kaito_flows.errors import PlanError
from kaito_flows.flows.giving_up import give_up
from kaito_flows.nodes import open_nodes
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.nodes.offers import budget
from kaito_flows.planning.serving import plan_serving
from kaito_flows.platforms import open_platform
from kaito_flows.settings import Settings
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.provision_nodes import Tenancy, check_nodes, node_request
from kaito_flows.tasks.roll_out import roll_out_inference
from kaito_flows.tasks.status import keeping_status, refuse_endless_runs, tell_cost, tell_leased
from kaito_flows.tasks.weights import pin_weights, weights_of
from kaito_flows.workspace import Workspace, parse_workspace
from kaito_flows.workspace.inference_config import INFERENCE_CONFIG_KEY
from kaito_flows.workspace.status import INFERENCE_READY, RESOURCE_READY


@flow(name="serve-workspace", flow_run_name="serve-{workspace.metadata.name}", on_cancellation=[give_up])
def serve_workspace(workspace: Workspace) -> dict[str, Any]:
    """Roll out what an inference Workspace names: a preset with its adapters, or its own pod template.

    Args:
        workspace: the KAITO Workspace.

    Returns:
        The facts of the run: where the service answers, and which models it knows.

    Raises:
        InputError: what the user wrote or offered cannot be used.
        RunError: the run failed although the input was right; what served before serves still.
    """
    settings = Settings()
    platform = open_platform(settings, workspace.namespace, str(current_run.id or ""))
    nodes = open_nodes(settings)
    if platform.kind == "local":
        hint = "on this machine, a tuning Workspace is served by kaito-flows tune"
        raise PlanError("inference Workspaces are for Kubernetes", place="inference", hint=hint, code="not-supported")
    platform.begin(workspace)
    with keeping_status(workspace, platform) as status:
        refuse_endless_runs()
        document = workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
        document["apiVersion"] = workspace.api_version
        name = workspace.inference.config if workspace.inference else ""
        config = platform.config_text(name, INFERENCE_CONFIG_KEY) if name else None
        file = parse_workspace(document, platform.kind, inference_config=config)
        inference = file.workspace.inference
        if inference is None:
            raise PlanError("it serves nothing", place="inference", hint="tune-workspace tunes", code="not-supported")
        plan = plan_serving(file, platform.kind, gpus=workspace.gpus) if inference.preset else None
        secrets = [name for adapter in inference.adapters for name in adapter.source.image_pull_secrets]
        weights = weights_of(plan, file.workspace) if plan else None
        platform.check_secrets(
            [*secrets, *(weights.pull_secrets if weights else ())], hub=weights.secret if weights else ""
        )
        if plan is not None:
            plan = pin_weights(plan, file.workspace, platform)
            artifacts.show_table("plan", plan.table_rows(), f"Plan of {workspace.name}")
        # One pod serves, however many nodes are asked for.
        request = replace(node_request(workspace, plan, platform, settings), count=1)
        if request.offers:
            check_nodes(request, nodes)
        limit, spent = budget(workspace.metadata.annotations, settings), NodeCost.from_dict(status.facts.get("cost"))
        with Tenancy(
            request, nodes, spent=spent, on_cost=lambda cost: tell_cost(status, cost), budget_usd=limit
        ) as tenancy:
            service = roll_out_inference(
                file, plan, tenancy, platform, lambda lease: tell_leased(status, platform, lease)
            )
        status.set(RESOURCE_READY, "True", "workspaceResourceStatusSuccess", ", ".join(service.nodes))
        status.facts["service"] = {"url": service.url}
        status.set(INFERENCE_READY, "True", "WorkspaceInferenceStatusSuccess", service.url)
    return {"workspace": workspace.name, "service": {"url": service.url, "models": list(service.models)}}
