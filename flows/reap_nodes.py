"""The flow `reap-nodes`: rented nodes that no run answers for are removed, whatever has become of the run.

It runs every five minutes, and when a Workspace was deleted. What one run of it cannot remove, the next one tries
again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.nodes.listing import nothing_rented
from kaito_flows.nodes.opening import open_rented
from kaito_flows.settings import Settings
from kaito_flows.tasks import artifacts
from kaito_flows.tasks.progress import log
from kaito_flows.tasks.reap import reap


@flow(name="reap-nodes", flow_run_name="reap-nodes")
def reap_nodes(
    dry_run: Annotated[bool, Field(title="Dry run", description="Only say what would be removed.")] = False,
    kinds: Annotated[
        list[Literal["karpenter", "aks"]] | None,
        Field(title="Kinds", description="Where to look; empty: where the settings rent nodes."),
    ] = None,
) -> list[dict[str, str]]:
    """Remove the rented nodes whose lease has run out, or whose run is over; return a row for each that was found.

    Args:
        dry_run: only say what would be removed.
        kinds: where to look; empty means where the settings rent nodes.

    Raises:
        CloudError: (code `not-reaped`) something could not be removed; it is tried again at the next run.
        InputError: the settings name a cloud, and not enough to reach it.
    """
    settings = Settings()
    rented = open_rented(settings, tuple(kinds or ()))
    if not rented:
        log(nothing_rented(settings))
        return []
    report = reap(rented, Cluster.connect(), settings, dry_run=dry_run)
    rows = [found.row for found in report.reaped]
    if rows:
        artifacts.show_table("rented-nodes", rows, "Rented nodes, and what was done about each")
    else:
        log("no node is rented")
    report.raise_if_incomplete()
    return rows
