"""The flow `delete-workspace`: everything of a Workspace in the cluster is stopped and removed; images stay."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from kaito_flows.platforms import Platform
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import log


def platform_in(namespace: str) -> Platform:
    """The platform that runs Workspaces in that namespace of the cluster."""
    # Imported late: the official client is large, and the watcher lives long without it.
    from kaito_flows.platforms.kubernetes import KubernetesPlatform

    return KubernetesPlatform(Settings(), namespace=namespace)


@flow(name="delete-workspace", flow_run_name="delete-{namespace}-{name}")
def delete_workspace(
    namespace: Annotated[str, Field(title="Namespace")],
    name: Annotated[str, Field(title="Name")],
    uid: Annotated[str, Field(title="UID", description="The deleted object's, for the record.")] = "",
) -> list[str]:
    """Stop the jobs and the service of a Workspace and remove what it made; return the names of what was stopped.

    It needs the name alone: a Workspace that is not valid can be deleted, and one that is gone.

    Args:
        namespace: where it is.
        name: its name.
        uid: its UID, which the run keeps for the record.

    Raises:
        ClusterError: the Kubernetes API does not answer.
        AccessError: it says no.
    """
    stopped = platform_in(namespace).delete(name)
    log(f"workspace {namespace}/{name} {uid}: removed {', '.join(stopped) or 'nothing: nothing was there'}")
    return stopped
