"""What `kaito-flows plan` says of rented nodes: which would be tried, in which order, and which cannot be had now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kaito_flows.cli import output
from kaito_flows.errors import SchedulingError

if TYPE_CHECKING:
    from kaito_flows.nodes.preflight import Prospect
    from kaito_flows.planning.plan import Plan
    from kaito_flows.planning.serving import ServingPlan
    from kaito_flows.settings import Settings
    from kaito_flows.workspace import WorkspaceFile

_OWN = "existing"


def prospects_of(loaded: WorkspaceFile, plan: Plan | ServingPlan, settings: Settings) -> list[Prospect]:
    """What a run of the plan would try to rent, and what each cloud says of it; nothing where nothing is rented.

    Raises:
        PlanError: as `offers`.
        InputError: as `open_nodes`.
        CloudError: a cloud does not answer.
    """
    if not settings.rents:
        return []
    from kaito_flows.nodes.offers import offers_of
    from kaito_flows.nodes.preflight import prospects

    # One pod serves, however many nodes are asked for.
    count = loaded.workspace.resource.count if loaded.workspace.tuning else 1
    return prospects(settings, offers_of(loaded.workspace, plan, settings), count)


def places_of(loaded: WorkspaceFile, settings: Settings) -> tuple[str, ...]:
    """Where else a run would tune, when no node can be had here; a service stays at home."""
    return settings.other_places if settings.rents and loaded.workspace.tuning else ()


def is_any_left(found: Sequence[Prospect], places: Sequence[str], settings: Settings) -> bool:
    """Whether nodes may be had: own ones, an offer that nothing speaks against, or those of another place."""
    return _OWN in settings.nodes.split(",") or any(not each.against for each in found) or bool(places)


def show(found: Sequence[Prospect], places: Sequence[str], settings: Settings) -> None:
    """Print them, provider by provider, and then the other places.

    Raises:
        SchedulingError: (code `no-node`) none can be had, as a run would find.
    """
    rows = []
    for kind in dict.fromkeys(settings.nodes.split(",")):
        if kind == _OWN:
            rows.append({"item": _OWN, "value": "own nodes that have the Workspace's labels, size and GPUs"})
        rows += [each.row() for each in found if each.provider == kind]
    rows += [
        {"item": "elsewhere", "value": f"the deployment tune-workspace/{place}, which finds its own nodes"}
        for place in places
    ]
    if rows:
        output.pairs(rows, title="Nodes, in the order in which they are tried")
    if not is_any_left(found, places, settings):
        raise SchedulingError(
            "none of them can be rented now" if found else "there is no size to rent",
            place="resource.instanceType",
            hint="more quota, or more sizes: annotation kaito-flows/instance-types",
            code="no-node",
        )
