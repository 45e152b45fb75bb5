"""Claims: what Karpenter is asked for, one NodeClaim a node, and what can be read from it again.

They are written as KAITO writes them, so that what KAITO's users have installed makes the nodes: Karpenter with a
provider, or Azure's gpu-provisioner; for KAITO up to 0.3 as Machines. To that come the record of the lease, the offer
and the number of nodes, as annotations, and a label by which a pool's claims and its nodes are found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kaito_flows.cluster.labels import WORKSPACE, label_value
from kaito_flows.cluster.resources import Object
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.node_classes import NodeClass
from kaito_flows.nodes.pools import OURS, POOL_LABEL, LeaseRecord
from kaito_flows.nodes.readiness import GPU, INSTANCE_TYPE

NODE_CLAIM = "karpenter.sh/v1/NodeClaim"
MACHINE = "karpenter.sh/v1alpha5/Machine"
_OFFER = OURS + "offer"
_COUNT = OURS + "count"
_GIB = 1024**3
# gpu-provisioner refuses a claim that does not say; what AKS gives to small nodes.
_USUAL_DISK_BYTES = 128 * _GIB
# A node that is given back is gone after this, whatever still runs there.
_DRAIN = "10m"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of ours, with what was written on it when its pool was asked for, and since."""

    object: Object
    pool: str
    record: LeaseRecord
    offer: Offer
    count: int

    @classmethod
    def of(cls, found: Object | None) -> Claim | None:
        """Read a claim; None for one that is not ours, and for a damaged one, which is nobody's to delete."""
        meta = (found or {}).get("metadata", {})
        annotations = meta.get("annotations", {})
        record = LeaseRecord.from_tags(annotations)
        if found is None or record is None:
            return None
        try:
            offer = Offer(**json.loads(annotations[_OFFER]))
            return cls(found, meta["labels"][POOL_LABEL], record, offer, int(annotations[_COUNT]))
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def name(self) -> str:
        """Its name, which its agent pool has as well."""
        return str(self.object["metadata"]["name"])

    @property
    def uid(self) -> str:
        """Tells it from another one of that name."""
        return str(self.object["metadata"]["uid"])

    @property
    def version(self) -> str:
        """Changes with each change."""
        return str(self.object["metadata"]["resourceVersion"])

    @property
    def is_leaving(self) -> bool:
        """Whether it has been deleted, and is there until its node is gone."""
        return "deletionTimestamp" in self.object["metadata"]


def claim_names(pool: str, count: int) -> tuple[str, ...]:
    """Return the names of a pool's claims: the first is the pool's own.

    gpu-provisioner makes an agent pool of a claim's name: they may have 12 letters and digits, and no hyphen.
    """
    others = (hashlib.sha256(f"{pool}\n{i}".encode()).hexdigest() for i in range(1, count))
    return (pool, *(pool[:2] + digest[: len(pool) - 2] for digest in others))


def manifest(
    kind: str, name: str, pool: str, offer: Offer, request: NodeRequest, record: LeaseRecord, node_class: NodeClass,
    zone: str = "",
) -> Object:  # fmt: skip
    """Return the claim for one node of a pool. `zone` is the offer's, as nodes are labelled with it.

    Field by field as KAITO's `pkg/utils/nodeclaim` does; it asks for spot nodes, zones, and GPUs besides, and a claim
    of ours never expires by itself: it is Karpenter's to make nodes here, and not to take them.
    """
    machine = kind == MACHINE
    pool_label = ("karpenter.sh/provisioner-name", "default") if machine else ("karpenter.sh/nodepool", "kaito")
    requirements = {
        pool_label[0]: pool_label[1],
        INSTANCE_TYPE: offer.instance_type,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    if machine:
        requirements["kaito.sh/machine-type"] = "gpu" if offer.gpus else "cpu"
    else:
        requirements["karpenter.sh/capacity-type"] = "spot" if offer.spot else "on-demand"
    if node_class.kind in ("AKSNodeClass", "KaitoNodeClass") and not machine:
        requirements["karpenter.azure.com/sku-name"] = offer.instance_type
    if zone:
        requirements["topology.kubernetes.io/zone"] = zone
    spec: Object = {
        "requirements": [{"key": key, "operator": "In", "values": [value]} for key, value in requirements.items()],
        "resources": {"requests": _resources(offer, request, node_class)},
        "taints": [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
    }
    if machine:
        spec["machineTemplateRef"] = {"name": name}
    else:
        spec["nodeClassRef"] = {"group": node_class.group, "kind": node_class.kind, "name": node_class.name}
        spec["expireAfter"] = "Never"
        spec["terminationGracePeriod"] = _DRAIN
    api_version, _, short = kind.rpartition("/")
    return {
        "apiVersion": api_version,
        "kind": short,
        "metadata": {
            "name": name,
            "labels": {
                **_selected(request),
                pool_label[0]: pool_label[1],
                WORKSPACE: label_value(request.workspace),
                "kaito.sh/workspacenamespace": request.namespace,
                "kaito.sh/machine-type": "gpu" if offer.gpus else "cpu",
                POOL_LABEL: pool,
            },
            "annotations": {
                "karpenter.sh/do-not-disrupt": "true",
                "kaito.sh/node-image-family": "ubuntu",
                **record.as_tags(),
                _OFFER: json.dumps(asdict(offer)),
                _COUNT: str(request.count),
            },
        },
        "spec": spec,
    }


def _selected(request: NodeRequest) -> Mapping[str, Any]:
    """The labels by which the Workspace chooses nodes: a node that is made for it has them."""
    among = {key: values[0] for key, values in request.any_of.items() if values and "kubernetes.io/" not in key}
    return {**among, **request.labels}


def _resources(offer: Offer, request: NodeRequest, node_class: NodeClass) -> Mapping[str, str]:
    """What a node must have: Karpenter compares it with its sizes, gpu-provisioner makes so large a disk."""
    disk = f"{-(-request.disk_bytes // _GIB)}Gi" if request.disk_bytes else ""
    found = {GPU: str(offer.gpus)} if request.gpus else {}
    if node_class.is_gpu_provisioner:
        return {**found, "storage": disk or f"{_USUAL_DISK_BYTES // _GIB}Gi"}
    return {**found, "ephemeral-storage": disk} if disk else found
