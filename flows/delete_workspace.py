"""The flow `delete-workspace`: everything of a Workspace in the cluster is stopped and removed; images stay.

Rented nodes are given back by whoever runs it, if its settings say that it rents. The watcher in a cluster does not
(`KAITO_FLOWS_NODES: existing` in its manifest): Azure's client is 32 MB, a sixth of what it may take, and the rights to
remove machines are better with flow runs alone. There the end of this flow starts `reap-nodes`
(deployments/kubernetes/base/prefect.yaml), which finds the service, or the Workspace, gone.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from kaito_flows.nodes.opening import release_all
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
        CloudError: a cloud does not, and nodes are still rented.
        AccessError: one of them says no.
    """
    stopped = platform_in(namespace).delete(name)
    log(f"workspace {namespace}/{name} {uid}: removed {', '.join(stopped) or 'nothing: nothing was there'}")
    release_all(Settings(), namespace, name)
    return stopped
