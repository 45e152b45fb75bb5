"""The flow `tune-workspace`: from a Workspace to an adapter that was proven, published, and answers."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run as current_run
from pydantic import Field

from kaito_flows.errors import SchedulingError
from kaito_flows.flows.giving_up import give_up
from kaito_flows.nodes import NodeLease, open_nodes
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.nodes.offers import budget
from kaito_flows.planning.plan import DatasetFacts
from kaito_flows.platforms import open_platform
from kaito_flows.report import report_markdown
from kaito_flows.settings import Settings
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.check_access import check_access
from kaito_flows.tasks.elsewhere import as_guest, namespace_of, other_places, tune_elsewhere
from kaito_flows.tasks.plan_workspace import plan as plan_task
from kaito_flows.tasks.plan_workspace import refine_plan
from kaito_flows.tasks.prepare_dataset import prepare
from kaito_flows.tasks.progress import listening
from kaito_flows.tasks.provision_nodes import Tenancy, check_nodes, node_request
from kaito_flows.tasks.publish import publish
from kaito_flows.tasks.roll_out import roll_out
from kaito_flows.tasks.status import keeping_status, refuse_endless_runs, tell_cost, tell_leased
from kaito_flows.tasks.tune import tune
from kaito_flows.tasks.weights import fetch_weights, pin_weights, weights_of
from kaito_flows.workspace import Workspace, parse_workspace
from kaito_flows.workspace.status import INFERENCE_READY, JOB_STARTED, RESOURCE_READY
from kaito_flows.workspace.training_config import CONFIG_KEY

TrainingConfigText = Annotated[
    str | None,
    Field(
        title="Training config",
        description="The text of training_config.yaml; empty: the Workspace's ConfigMap, or the method's defaults.",
    ),
]
Serve = Annotated[
    bool | None,
    Field(title="Serve", description="Roll the adapter out; unset: as the annotation kaito-flows/serve says, or yes."),
]
Port = Annotated[int | None, Field(title="Port", ge=1, le=65535, description="The service's port on this machine.")]


@flow(name="tune-workspace", flow_run_name="tune-{workspace.metadata.name}", on_cancellation=[give_up])
def tune_workspace(
    workspace: Workspace,
    training_config: TrainingConfigText = None,
    serve: Serve = None,
    port: Port = None,
) -> dict[str, Any]:
    """Tune the model that a KAITO Workspace names, publish the adapter, and serve it.

    Started again after a crash, the run takes up what is there: a job that still runs, its last checkpoint, an adapter
    that was published.

    Args:
        workspace: the KAITO Workspace.
        training_config: the text of `training_config.yaml`; empty means the Workspace's ConfigMap, or else the
            defaults of the method.
        serve: whether to roll the adapter out; unset means as the annotation `kaito-flows/serve` says, or yes.
        port: the port of the service on this machine; unset means a free one.

    Returns:
        The facts of the run: adapter, metrics, answers, service, seconds of each stage.

    Raises:
        InputError: what the user wrote or offered cannot be used.
        RunError: the run failed although the input was right.
    """
    settings = Settings()
    platform = open_platform(settings, namespace_of(workspace, settings), str(current_run.id or ""))
    nodes = open_nodes(settings)
    port = port or (settings.serve_port if platform.kind == "local" else None)
    seconds: dict[str, float] = {}

    def keep_time(stage: str, event: dict[str, Any]) -> None:
        if event["event"] == "finished":
            seconds[stage] = event["seconds"]

    platform.begin(workspace)
    with as_guest(workspace, platform), listening(keep_time), keeping_status(workspace, platform) as status:
        refuse_endless_runs()
        document = workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
        document["apiVersion"] = workspace.api_version  # a form leaves out what has only one value
        config = workspace.tuning.config if workspace.tuning else ""
        if training_config is None and config:
            training_config = platform.config_text(config, CONFIG_KEY)
        file = parse_workspace(document, platform.kind, training_config=training_config)
        plan = plan_task(file, platform.kind, settings.rents)
        check_access(file, plan, platform, port)
        plan = pin_weights(plan, workspace, platform)
        request = node_request(workspace, plan, platform, settings)
        lacking = None
        if request.offers:
            try:
                check_nodes(request, nodes)
            except SchedulingError as exc:
                if not other_places(workspace, settings):
                    raise
                lacking = exc
        serves = workspace.serve if serve is None else serve

        def on_lease(lease: NodeLease) -> None:
            status.set(JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted")
            tell_leased(status, platform, lease)

        def warm_up(lease: NodeLease) -> None:
            platform.warm_up(workspace.name, lease.nodes, weights_of(plan, workspace))

        spent = NodeCost.from_dict(status.facts.get("cost"))
        with Tenancy(
            request,
            nodes,
            spent=spent,
            on_cost=lambda cost: tell_cost(status, cost),
            warm_up=warm_up,
            budget_usd=budget(workspace.metadata.annotations, settings),
            stop_job=lambda: platform.stop_jobs(workspace.name),
            lacking=lacking,
        ) as tenancy:
            # While nodes boot, the data is prepared; unless it may be what was tuned already, which takes no node.
            if not settings.rents or "adapter" not in status.facts:
                tenancy.begin()
            weights = fetch_weights(weights_of(plan, workspace), platform)
            dataset = prepare(file, plan, weights, platform)
            plan = refine_plan(plan, DatasetFacts.of(dataset.image.digest, dataset.facts))
            status.facts["identity"] = plan.identity
            try:
                adapter = tune(plan, dataset, tenancy, workspace, platform, on_lease)
            except SchedulingError as exc:
                places = other_places(workspace, settings)
                if exc.code != "no-node" or not places:
                    raise
                tenancy.give_back()
                cost = tune_elsewhere(workspace, training_config, places, exc, platform, settings.pending_seconds)
                tenancy.add_cost(cost)
                status.set(RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "tuned in another place")
                status.set(JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted")
                adapter = tune(plan, dataset, tenancy, workspace, platform, on_lease)
                adapter = replace(adapter, reused=False, training_seconds=cost.training_seconds)
            if adapter.reused:
                status.set(RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "nothing was to be trained")
                status.set(JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted")
            if not serves:
                tenancy.give_back(keep=True)
            reference = publish(adapter, workspace, platform)
            output = workspace.tuning.output.image if workspace.tuning else ""
            facts: dict[str, Any] = {
                "workspace": workspace.name,
                "namespace": platform.namespace,
                "flow_run_id": str(current_run.id),
                "identity": plan.identity,
                "adapter": {"reference": reference, "image": output, "digest": adapter.image.digest},
                "dataset": {"digest": dataset.image.digest, "reused": dataset.reused},
                "metrics": adapter.metrics,
                "history": list(adapter.history),
                "samples": list(adapter.samples),
                "reused": adapter.reused,
                "cost_usd": plan.cost_usd,
            }
            status.facts["adapter"] = facts["adapter"]
            if serves:
                with tenancy.for_service() as home:
                    service, answers = roll_out(plan, adapter.image, dataset.image, home, workspace, platform, port)
                facts["service"] = {"url": service.url, "models": list(service.models), "adopted": service.adopted}
                facts["answers"] = asdict(answers)
                status.facts["service"] = facts["service"]
                status.set(INFERENCE_READY, "True", "WorkspaceInferenceStatusSuccess", service.url)
        facts["cost"] = tell_cost(
            status, NodeCost.from_dict(status.facts.get("cost")).trained(adapter.training_seconds)
        )
        facts["seconds"] = seconds
        artifacts.show_markdown("tuning-report", report_markdown(facts), f"Report of {workspace.name}")
    return facts
