"""Agent pools as AKS has them, and as pools: what is asked for, what is read, what is written back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from azure.mgmt.containerservice.models import AgentPool, GPUProfile
from azure.mgmt.containerservice.models import AgentPoolManagedClusterAgentPoolProfileProperties as Properties

from kaito_flows.nodes.azure.errors import capacity_code, said, shortened
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.pools import POOL_LABEL, LeaseRecord, Pool, PoolState
from kaito_flows.planning.skus import find_sku
from kaito_flows.presets.loader import load_skus

_TAINT: Final = "sku=gpu:NoSchedule"
_SMALLEST_DISK_GIB: Final = 128
# A pool that is being changed has its nodes; only one that is being made does not.
_STATES: Final[dict[str, PoolState]] = {
    "Creating": "creating",
    "Failed": "failed",
    "Canceling": "failed",
    "Canceled": "failed",
    "Deleting": "deleting",
}
# What a kubelet refuses to be started with, what AKS says of its nodes itself, and what would make KAITO's
# gpu-provisioner take the pool for one of its own, whose claim is gone, and remove it.
_RESERVED: Final = ("kubernetes.io", "k8s.io", "kubernetes.azure.com", "karpenter.sh")
# What AKS tells, but does not take back: of these the SDK itself leaves out only some. An image's version that is sent
# is a wish to go back to it.
_TOLD_ONLY: Final = ("status", "nodeImageVersion", "virtualMachineNodesStatus")


@dataclass(frozen=True, slots=True)
class Network:
    """The subnets that a cluster's nodes and their pods are in; None where AKS has made them."""

    nodes: str | None = None
    pods: str | None = None


def network_of(pools: Sequence[AgentPool]) -> Network:
    """Where a cluster's system pool is: in a network of one's own, AKS takes no pool that does not say as much."""
    for found in pools:
        if found.properties and found.properties.mode == "System":
            return Network(found.properties.vnet_subnet_id, found.properties.pod_subnet_id)
    return Network()


def new_pool(
    name: str, offer: Offer, request: NodeRequest, record: LeaseRecord, *, spot_max_price: float, network: Network
) -> AgentPool:
    """The agent pool for a run, as it is asked for: labelled as KAITO does, tainted, its record in the tags."""
    properties = Properties(
        mode="User",
        vm_size=offer.instance_type,
        count=request.count,
        os_type="Linux",
        os_disk_size_gb=max(_SMALLEST_DISK_GIB, math.ceil(request.disk_bytes / 2**30)),
        node_labels=_labels(name, request),
        node_taints=[_TAINT],
        tags=record.as_tags(),
    )
    if network.nodes:
        properties.vnet_subnet_id = network.nodes
    if network.pods:
        properties.pod_subnet_id = network.pods
    if offer.zone:
        properties.availability_zones = [offer.zone]
    if request.gpus:
        properties.gpu_profile = GPUProfile(driver="Install")
    if offer.spot:
        properties.scale_set_priority = "Spot"
        properties.scale_set_eviction_policy = "Delete"
        properties.spot_max_price = spot_max_price
    return AgentPool(properties=properties)


def _labels(name: str, request: NodeRequest) -> dict[str, str]:
    wanted = {**{key: values[0] for key, values in request.any_of.items() if values}, **request.labels}
    return {
        **{key: value for key, value in wanted.items() if not _is_reserved(key)},
        "kaito.sh/workspace": request.workspace,
        "kaito.sh/workspacenamespace": request.namespace,
        "kaito.sh/machine-type": "gpu" if request.gpus else "cpu",
        POOL_LABEL: name,
    }


def _is_reserved(key: str) -> bool:
    domain = key.rpartition("/")[0]
    return key == "agentpool" or any(domain == known or domain.endswith("." + known) for known in _RESERVED)


def pool_of(found: AgentPool) -> Pool | None:
    """The agent pool as a pool; None for one without a record, which is not ours."""
    properties = found.properties
    record = LeaseRecord.from_tags(properties.tags) if properties else None
    if properties is None or record is None:
        return None
    told = properties.provisioning_state or ""
    state = _STATES.get(told, "ready")
    failure = said(properties.status.provisioning_error) if properties.status else ""
    reason = {"failed": shortened(failure), "creating": f"AKS: {told}"}.get(state, "")
    return Pool(
        name=found.name or "",
        offer=_offer(properties),
        count=properties.count or 0,
        state=state,
        record=record,
        reason=reason,
        code=failure_code(failure),
        version=properties.e_tag or "",
    )


def failure_code(text: str) -> str:
    """The code for the reason of a failed pool: what is short, or `pool-failed`."""
    return capacity_code(text) or "pool-failed"


def _offer(properties: Properties) -> Offer:
    size, zones = properties.vm_size or "", properties.availability_zones or []
    sku = find_sku(size, load_skus())
    return Offer(
        instance_type=sku.name if sku else size,
        gpus=sku.gpus if sku else 1,
        spot=properties.scale_set_priority == "Spot",
        zone=zones[0] if len(zones) == 1 else "",
        price_usd_hour=sku.price_usd_hour if sku else None,
    )


def marked(found: AgentPool, record: LeaseRecord) -> AgentPool:
    """The agent pool as it is to be written back: with another record, and otherwise as it was read."""
    body = found.as_dict(exclude_readonly=True)
    properties = {key: value for key, value in body["properties"].items() if key not in _TOLD_ONLY}
    properties["tags"] = {**properties.get("tags", {}), **record.as_tags()}
    return AgentPool({"properties": properties})
