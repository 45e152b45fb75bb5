"""The flow `tune-workspace`: from a Workspace to an adapter that was proven, published, and answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.runtime import flow_run as current_run
from pydantic import Field

from kaito_flows.errors import InputError, KaitoFlowsError
from kaito_flows.nodes import LocalNodes, NodeLease
from kaito_flows.planning.plan import DatasetFacts
from kaito_flows.platforms import LocalPlatform
from kaito_flows.report import report_markdown
from kaito_flows.settings import Settings
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.check_access import check_access
from kaito_flows.tasks.fetch_weights import fetch_weights
from kaito_flows.tasks.plan_workspace import plan as plan_task
from kaito_flows.tasks.plan_workspace import refine_plan
from kaito_flows.tasks.prepare_dataset import prepare
from kaito_flows.tasks.progress import listening, log
from kaito_flows.tasks.provision_nodes import provision_nodes, release_nodes
from kaito_flows.tasks.publish import publish
from kaito_flows.tasks.roll_out import roll_out
from kaito_flows.tasks.tune import tune
from kaito_flows.workspace import Workspace, parse_workspace
from kaito_flows.workspace.status import (
    INFERENCE_READY,
    JOB_STARTED,
    RESOURCE_READY,
    WORKSPACE_SUCCEEDED,
    WorkspaceStatus,
    columns,
    utc_now,
)

TrainingConfigText = Annotated[
    str | None,
    Field(title="Training config", description="The text of training_config.yaml; empty: the method's defaults."),
]
Serve = Annotated[
    bool | None,
    Field(title="Serve", description="Roll the adapter out; unset: as the annotation kaito-flows/serve says, or yes."),
]
Port = Annotated[int | None, Field(title="Port", ge=1, le=65535, description="The service's port on this machine.")]


def stop_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """On cancellation: stop the Workspace's jobs, by its name alone."""
    name = flow_run.parameters["workspace"]["metadata"]["name"]
    LocalPlatform(Settings()).stop_jobs(name)


@flow(name="tune-workspace", flow_run_name="tune-{workspace.metadata.name}", on_cancellation=[stop_jobs])
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
        training_config: the text of `training_config.yaml`; empty means the defaults of the method.
        serve: whether to roll the adapter out; unset means as the annotation `kaito-flows/serve` says, or yes.
        port: the port of the service on this machine; unset means a free one.

    Returns:
        The facts of the run: adapter, metrics, answers, service, seconds of each stage.

    Raises:
        InputError: what the user wrote or offered cannot be used.
        RunError: the run failed although the input was right.
    """
    settings = Settings()
    platform, nodes = LocalPlatform(settings), LocalNodes()
    port = port or settings.serve_port
    seconds: dict[str, float] = {}

    def keep_time(stage: str, event: dict[str, Any]) -> None:
        if event["event"] == "finished":
            seconds[stage] = event["seconds"]

    document = workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
    document["apiVersion"] = workspace.api_version  # a form leaves out what has only one value
    file = parse_workspace(document, "local", training_config=training_config)
    with listening(keep_time), _status_of(workspace, platform) as status:
        plan = plan_task(file, "local")
        check_access(file, plan, platform, port)
        lease_to_come = provision_nodes.submit(plan, nodes)
        try:
            # On a CPU, while nodes boot.
            weights = fetch_weights(plan.preset, platform)
            dataset = prepare(file, plan, weights, platform)
            plan = refine_plan(plan, DatasetFacts.of(dataset.image.digest, dataset.facts))
            lease = lease_to_come.result()
            status.set(RESOURCE_READY, "True", "workspaceResourceStatusSuccess", ", ".join(lease.nodes))
            status.set(JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted")
            platform.check_known(workspace.name)
            platform.write_status(workspace.name, status.as_dict())
            adapter = tune(plan, dataset, lease, weights, platform)
        finally:
            # A lease that failed is told where it is asked for; there is nothing to give back.
            leased = lease_to_come.result(raise_on_failure=False)
            if isinstance(leased, NodeLease):
                release_nodes(leased, nodes)
        output = workspace.tuning.output.image if workspace.tuning else ""
        reference = publish(adapter, output)
        facts: dict[str, Any] = {
            "workspace": workspace.name,
            "flow_run_id": str(current_run.id),
            "identity": plan.identity,
            "adapter": {"reference": reference, "image": output, "digest": adapter.image.digest},
            "dataset": {"digest": dataset.image.digest, "reused": dataset.reused},
            "metrics": adapter.metrics,
            "history": list(adapter.history),
            "reused": adapter.reused,
            "cost_usd": plan.cost_usd,
        }
        if workspace.serve if serve is None else serve:
            service, answers = roll_out(plan, adapter.image, dataset.image, weights, platform, port)
            facts["service"] = {"url": service.url, "models": list(service.models), "adopted": service.adopted}
            facts["answers"] = asdict(answers)
            status.set(INFERENCE_READY, "True", "WorkspaceInferenceStatusSuccess", service.url)
        facts["seconds"] = seconds
        status.facts = {
            key: facts[key] for key in ("adapter", "flow_run_id", "identity") + ("service",) * ("service" in facts)
        }
        artifacts.show_markdown("tuning-report", report_markdown(facts), f"Report of {workspace.name}")
    return facts


@contextmanager
def _status_of(workspace: Workspace, platform: LocalPlatform) -> Iterator[WorkspaceStatus]:
    """Keep the Workspace's status while the block lasts: running, then succeeded, or failed with its cause."""
    before = platform.read_status(workspace.name)
    status = WorkspaceStatus(
        name=workspace.name,
        api_version=workspace.api_version,
        instance_type=workspace.resource.instance_type,
        created=before["created"] if before else utc_now(),
        generation=workspace.metadata.generation or 1,
        state="Running",
        conditions=WorkspaceStatus.from_dict(before).conditions if before else {},
        facts=before["facts"] if before else {},
    )
    status.set(WORKSPACE_SUCCEEDED, "False", "workspacePending", "running")
    platform.write_status(workspace.name, status.as_dict())
    try:
        yield status
    except Exception as exc:
        # Bad input is found before a job runs, or by the job itself. After any other failure the job would run for
        # nobody. (A run that is killed never gets here: its job is taken up by the next.)
        if not isinstance(exc, InputError):
            platform.stop_jobs(workspace.name)
        code = exc.code if isinstance(exc, KaitoFlowsError) else "unexpected-error"
        status.state = "Failed"
        status.set(WORKSPACE_SUCCEEDED, "False", "workspaceFailed", f"{exc if str(exc) else code}")
        raise
    except BaseException:
        # Ctrl-C or a cancellation; the job, if it still runs, is stopped by who asked for that.
        status.state = "Stopped"
        status.set(WORKSPACE_SUCCEEDED, "False", "workspaceStopped", "interrupted")
        raise
    else:
        status.state = "Succeeded"
        status.set(WORKSPACE_SUCCEEDED, "True", "workspaceSucceeded")
    finally:
        if platform.read_status(workspace.name) is not None:  # else it was deleted meanwhile
            platform.write_status(workspace.name, status.as_dict())
        rows = [columns(status)]
        artifacts.show_table("workspace-status", rows, f"Status of {workspace.name}")
        log(f"workspace {workspace.name}: {status.state}")
