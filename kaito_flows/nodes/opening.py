"""The node provider that the settings name."""

from __future__ import annotations

from kaito_flows.nodes.base import NodeProvider
from kaito_flows.nodes.local import LocalNodes
from kaito_flows.settings import Settings


def open_nodes(settings: Settings) -> NodeProvider:
    """Return the provider: this machine, or the cluster's own nodes.

    Raises:
        InputError: (code `no-cluster`) the settings say Kubernetes, and none is known.
    """
    if settings.platform == "local":
        return LocalNodes()
    from kaito_flows.cluster.gateway import Cluster
    from kaito_flows.nodes.existing import ExistingNodes

    return ExistingNodes(Cluster.connect())
