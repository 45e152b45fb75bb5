"""Plan: what it will take, before anything is started."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.planning.plan import DatasetFacts, Plan, plan_rented, plan_workspace
from kaito_flows.tasks.artifacts import show_table
from kaito_flows.tasks.measured import memory_share
from kaito_flows.tasks.progress import log, stage, tell
from kaito_flows.workspace import WorkspaceFile
from kaito_flows.workspace.validation import Platform


@task(name="plan", task_run_name="plan-{file.workspace.name}", cache_policy=NO_CACHE)
def plan(file: WorkspaceFile, platform: Platform, rents: bool) -> Plan:
    """Plan the run; raise `PlanError` when it cannot be done. Where nodes are rented, no size means the cheapest."""
    with stage("plan"):
        if rents:
            made = plan_rented(file, measured=memory_share)
        else:
            made = plan_workspace(file, platform, gpus=file.workspace.gpus, measured=memory_share)
        for note in made.notes:
            log(note)
        _show(made)
        tell("plan", "planned", rows=made.table_rows())
        return made


@task(name="refine-plan", task_run_name="refine-plan-{plan.workspace}", cache_policy=NO_CACHE)
def refine_plan(plan: Plan, dataset: DatasetFacts) -> Plan:
    """Fill in what only the prepared data can tell: steps, time, cost, and the run's identity."""
    refined = plan.with_dataset(dataset)
    _show(refined)
    known = [row["value"] for row in plan.table_rows()]
    tell("plan", "planned", rows=[row for row in refined.table_rows() if row["value"] not in known])
    return refined


def _show(plan: Plan) -> None:
    show_table("plan", plan.table_rows(), f"Plan of {plan.workspace}")
