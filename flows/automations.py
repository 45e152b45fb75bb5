"""What Prefect's server does about runs whose process is gone: two automations, made once and kept up to date.

    python -m kaito_flows.flows.automations        (`make deploy` does it)

`crash-zombies`: a run whose heartbeat has stopped is marked as crashed. `resume-crashed`: a crashed run of a Workspace
is scheduled again, if it is one of a deployment, and takes up the job that is still there. It waits for a while first,
because the runner and the worker both report a crash, a second apart, and the later report would undo the resumption.
How often a run may be resumed is the flow's to say (`run_count`), and the watcher's of one that never comes to run.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from kaito_flows.flows.watching.wish import TAG

HEARTBEAT = timedelta(seconds=30)
"""Workers are to run with it: `PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30`."""

_ANY_RUN = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
# What makes a crashed run none to resume: it goes on already, or somebody has stopped it for good.
_SETTLED = {
    f"prefect.flow-run.{state}"
    for state in ("Running", "Scheduled", "AwaitingRetry", "Pending", "Cancelling", "Cancelled", "Failed")
}


def automations(heartbeat: timedelta = HEARTBEAT, resume_after: timedelta = timedelta(seconds=15)) -> list[Automation]:
    """The automations, for runs that give a sign of life every `heartbeat`; three that are missed are too many."""
    silence = 3 * heartbeat
    of_workspaces = ResourceSpecification(
        {"prefect.resource.role": "tag", "prefect.resource.id": [f"prefect.tag.{TAG}"]}
    )
    return [
        Automation(
            name="crash-zombies",
            description="A flow run whose heartbeat has stopped has crashed.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},
                match=_ANY_RUN,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=silence,
            ),
            actions=[
                ChangeFlowRunState(state=StateType.CRASHED, message=f"No heartbeat for {silence.total_seconds():.0f} s")
            ],
        ),
        Automation(
            name="resume-crashed",
            description="A crashed run of a Workspace is scheduled again, and takes up what is there.",
            trigger=EventTrigger(
                after={"prefect.flow-run.Crashed"},
                expect=_SETTLED,
                match=_ANY_RUN,
                match_related=of_workspaces,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=resume_after,
            ),
            actions=[
                ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="resumed after a crash")
            ],
        ),
    ]


def ensure_automations(wanted: list[Automation] | None = None) -> dict[str, str]:
    """Create the automations that are missing, mend those that differ; by name: created, updated or unchanged."""
    done: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        for automation in automations() if wanted is None else wanted:
            found = client.read_automations_by_name(automation.name)
            if not found:
                client.create_automation(_core(automation))
                done[automation.name] = "created"
            elif _facts(found[0]) != _facts(automation):
                client.update_automation(found[0].id, _core(automation))
                done[automation.name] = "updated"
            else:
                done[automation.name] = "unchanged"
    return done


_SERVERS_OWN = {"id", "owner_resource"}


def _core(automation: Automation) -> AutomationCore:
    return AutomationCore(**automation.model_dump(exclude=_SERVERS_OWN))


def _facts(automation: AutomationCore) -> Any:
    """What was asked for, as both sides write it; sets stay sets, for JSON has them in any order."""
    written = automation.model_dump(mode="json", exclude=_SERVERS_OWN)
    return AutomationCore.model_validate(written).model_dump()


if __name__ == "__main__":
    for name, what in ensure_automations().items():
        sys.stdout.write(f"automation {name}: {what}\n")
