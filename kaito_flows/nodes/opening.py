"""The node provider that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kaito_flows.errors import InputError, KaitoFlowsError
from kaito_flows.nodes.base import Holder, NodeProvider
from kaito_flows.nodes.local import LocalNodes
from kaito_flows.settings import Settings

if TYPE_CHECKING:
    from kaito_flows.cluster.gateway import Cluster
    from kaito_flows.nodes.renting import RentedNodes


def open_nodes(settings: Settings) -> NodeProvider:
    """Return the provider: this machine, the cluster's own nodes, rented ones, or several in a row.

    Raises:
        InputError: (code `no-cluster`) the settings say Kubernetes, and none is known; (code `no-cloud`) they say AKS,
            and not which cluster, or Azure's SDK is not installed.
    """
    if settings.platform == "local":
        return LocalNodes()
    from kaito_flows.cluster.gateway import Cluster

    cluster = Cluster.connect()
    providers = {kind: _open(kind, settings, cluster) for kind in settings.nodes.split(",")}
    if len(providers) == 1:
        return next(iter(providers.values()))
    from kaito_flows.nodes.chain import Chain

    return Chain(providers)


def open_rented(settings: Settings, kinds: tuple[str, ...] = ()) -> list[RentedNodes]:
    """Return those of the providers that rent, for who looks after all leases; `kinds` instead of the settings' own.

    Raises:
        InputError: as `open_nodes`.
    """
    named = kinds or tuple(dict.fromkeys(settings.nodes.split(",")))
    rented = [kind for kind in named if kind != "existing"]
    if not rented:
        return []
    from kaito_flows.cluster.gateway import Cluster

    cluster = Cluster.connect()
    return [_rented(kind, settings, cluster) for kind in rented]


def release_all(settings: Settings, namespace: str, workspace: str) -> None:
    """Give back all that any run, or the service, of a Workspace has rented; a provider that fails keeps no other.

    Raises:
        InputError: as `open_nodes`.
        CloudError: a cloud does not answer, and its nodes are still there.
    """
    faults: list[KaitoFlowsError] = []
    for provider in open_rented(settings):
        try:
            provider.release(Holder(namespace, workspace))
        except KaitoFlowsError as exc:
            faults.append(exc)
    if faults:
        raise faults[0]


def _open(kind: str, settings: Settings, cluster: Cluster) -> NodeProvider:
    if kind == "existing":
        from kaito_flows.nodes.existing import ExistingNodes

        return ExistingNodes(cluster)
    return _rented(kind, settings, cluster)


def _rented(kind: str, settings: Settings, cluster: Cluster) -> RentedNodes:
    from kaito_flows.nodes.renting import RentedNodes

    if kind == "aks":
        try:
            from kaito_flows.nodes.aks import AksPools
        except ImportError as exc:
            raise InputError(
                "nodes are to come from AKS, and Azure's SDK is not installed",
                place="KAITO_FLOWS_NODES",
                hint="pip install 'kaito-flows[aks]'",
                code="no-cloud",
            ) from exc

        return RentedNodes(AksPools.connect(settings), cluster, settings)
    from kaito_flows.nodes.karpenter import NodeClaims

    return RentedNodes(NodeClaims(cluster, settings), cluster, settings)
