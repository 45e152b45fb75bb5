"""A small Karpenter for tests: it makes nodes that nobody runs of NodeClaims and Machines, step by step, or refuses to.

The steps, conditions, reasons, Events and finalizers are those of Karpenter's own lifecycle controller
(kubernetes-sigs/karpenter, `pkg/controllers/nodeclaim/lifecycle`); what stands in is the cloud behind it.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.refusals import ConflictError
from kaito_flows.nodes.claims import MACHINE, NODE_CLAIM

FINALIZER = "karpenter.sh/termination"
STEPS = ("launched", "joined", "node ready", "gpus")

_CAPACITY = "karpenter.sh/capacity-type"
_INSTANCE_TYPE = "node.kubernetes.io/instance-type"
_TICK_SECONDS = 0.05


@dataclass(frozen=True)
class Refusal:
    """How a launch fails: with an Event and the claim's removal, as for want of capacity, or by a condition."""

    reason: str
    message: str
    removes: bool = False


class Provisioner:
    """Serves the claims of one namespace's Workspaces, from a thread of its own, inside its `with` block.

    `refusals` are by size, or by size and `spot`; `limit` is the step that claims do not go beyond, by size or for all
    (""); `refused_names` refuses single claims. At the end every claim and node of the namespace is removed.
    """

    def __init__(self, cluster: Cluster, kind: str = NODE_CLAIM, gpus: int = 1) -> None:
        self._cluster = cluster
        self._kind = kind
        self._gpus = gpus
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._errors: list[Exception] = []
        self._events: list[str] = []
        self.refusals: dict[str, Refusal] = {}
        self.refused_names: dict[str, Refusal] = {}
        self.limit: dict[str, str] = {}
        self.launched: list[str] = []

    def __enter__(self) -> Provisioner:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.limit.clear()
        for claim in self.claims():
            self._cluster.delete(self._kind, claim["metadata"]["name"])
        deadline = time.monotonic() + 30
        while self.claims() and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(_TICK_SECONDS)
        left = [claim["metadata"]["name"] for claim in self.claims()]
        self._over.set()
        self._thread.join()
        for name in left:
            self._cluster.patch(self._kind, name, {"metadata": {"finalizers": None}})
            self._cluster.delete("Node", name)
        for event in self._events:
            self._cluster.within("default").delete("Event", event)
        if self._errors:
            raise self._errors[0]
        assert not left, f"claims are left: {left}"

    def claims(self) -> list[dict[str, Any]]:
        """The claims of the namespace's Workspaces."""
        return self._cluster.list(self._kind, labels={"kaito.sh/workspacenamespace": self._cluster.namespace})

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the namespace's Workspaces."""
        return self._cluster.list("Node", labels={"kaito.sh/workspacenamespace": self._cluster.namespace})

    def hold(self, step: str, size: str = "") -> None:
        """Let claims (of a size) go up to a step, and no further; `launched` to `gpus`, or "" for not at all."""
        self.limit[size] = step

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                for claim in self.claims():
                    try:
                        self._reconcile(claim)
                    except ConflictError:
                        continue  # somebody has written there: look again
            except Exception as exc:  # noqa: BLE001 - told at the end of the block
                self._errors.append(exc)
                return
            self._over.wait(_TICK_SECONDS)

    def _may(self, step: str, size: str) -> bool:
        limit = self.limit.get(size, self.limit.get("", STEPS[-1]))
        return limit != "" and STEPS.index(step) <= STEPS.index(limit)

    def _reconcile(self, claim: dict[str, Any]) -> None:
        meta = claim["metadata"]
        if "deletionTimestamp" in meta:
            return self._finalize(claim)
        if FINALIZER not in meta.get("finalizers", []):
            self._patch(claim, {"metadata": {"finalizers": [*meta.get("finalizers", []), FINALIZER]}})
            return None
        conditions = {c["type"]: c for c in claim.get("status", {}).get("conditions", [])}
        if not conditions:
            return self._say(claim, **dict.fromkeys(("Launched", "Registered", "Initialized"), self._awaiting))
        return self._step(claim, conditions)

    @property
    def _awaiting(self) -> tuple[str, str, str]:
        return ("Unknown", "", "") if self._kind == MACHINE else (
            "Unknown", "AwaitingReconciliation", "object is awaiting reconciliation",
        )  # fmt: skip

    def _step(self, claim: dict[str, Any], conditions: dict[str, Any]) -> None:
        name = claim["metadata"]["name"]
        wanted = {r["key"]: r["values"][0] for r in claim["spec"]["requirements"]}
        size, capacity = wanted[_INSTANCE_TYPE], wanted.get(_CAPACITY, "on-demand")
        if not self._is(conditions, "Launched"):
            refusal = self.refused_names.get(name) or self.refusals.get(f"{size} {capacity}", self.refusals.get(size))
            if refusal is not None:
                self._refuse(claim, refusal)
            elif self._may("launched", size):
                self.launched.append(name)
                found = {_INSTANCE_TYPE: size, _CAPACITY: capacity, "karpenter.sh/nodeclaim": name}
                self._patch(claim, {"metadata": {"labels": found}})
                self._cluster.patch(self._kind, name, {"status": {"providerID": f"test:///{name}"}}, "status")
                absent = ("Unknown", "NodeNotFound", "Node not registered with cluster")
                self._say(claim, Launched=("True", "Launched", ""), Registered=absent, Initialized=absent)
        elif not self._is(conditions, "Registered"):
            if self._may("joined", size):
                self._join(claim, size)
                cold = ("Unknown", "NodeNotReady", "Node status is NotReady")
                self._say(claim, node=name, Registered=("True", "Registered", ""), Initialized=cold)
        elif not self._is(conditions, "Initialized"):
            ready, gpus = self._may("node ready", size), self._may("gpus", size)
            self._cluster.patch("Node", name, {"status": _node_status(ready, self._gpus if gpus else 0)}, "status")
            if gpus:
                self._say(claim, Initialized=("True", "Initialized", ""), Ready=("True", "Ready", ""))

    def _refuse(self, claim: dict[str, Any], refusal: Refusal) -> None:
        if not refusal.removes:
            status = "False" if self._kind == MACHINE else "Unknown"
            self._say(claim, Launched=(status, refusal.reason, refusal.message))
            return
        meta, now = claim["metadata"], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kind = self._kind.rpartition("/")[2]
        event = f"{meta['name']}.{secrets.token_hex(6)}"
        self._events.append(event)
        self._cluster.within("default").create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": event, "namespace": "default"},
                "involvedObject": {"kind": kind, "name": meta["name"], "uid": meta["uid"]},
                "reason": refusal.reason,
                "message": f"{kind} {meta['name']} event: {refusal.message}",
                "type": "Warning",
                "source": {"component": "karpenter"},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            }
        )
        self._cluster.delete(self._kind, meta["name"], uid=meta["uid"])

    def _join(self, claim: dict[str, Any], size: str) -> None:
        meta = claim["metadata"]
        labels = {**meta["labels"], _INSTANCE_TYPE: size, "kubernetes.io/hostname": meta["name"]}
        labels["karpenter.sh/registered"] = "true"
        node = {"name": meta["name"], "labels": labels}
        spec = {"taints": claim["spec"]["taints"], "providerID": f"test:///{meta['name']}"}
        self._cluster.create(
            {"apiVersion": "v1", "kind": "Node", "metadata": node, "spec": spec, "status": _node_status(False, 0)}
        )

    def _finalize(self, claim: dict[str, Any]) -> None:
        meta = claim["metadata"]
        if self._cluster.delete("Node", meta["name"]):
            return  # the claim goes when its node is gone
        finalizers = [finalizer for finalizer in meta.get("finalizers", []) if finalizer != FINALIZER]
        self._patch(claim, {"metadata": {"finalizers": finalizers}})

    def _say(self, claim: dict[str, Any], node: str = "", **said: tuple[str, str, str]) -> None:
        """Set conditions: status, reason, message."""
        prefix = "Machine" if self._kind == MACHINE else ""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        conditions = {c["type"]: c for c in claim.get("status", {}).get("conditions", [])}
        for kind, (status, reason, message) in said.items():
            typed = kind if kind == "Ready" else prefix + kind
            before = conditions.get(typed, {})
            since = before["lastTransitionTime"] if before.get("status") == status else now
            told = {"type": typed, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}
            # Kubernetes 1.20 makes null of an empty text in a patch's list.
            conditions[typed] = {key: value for key, value in told.items() if value}
        status_of = {"conditions": list(conditions.values())}
        if node and not prefix:
            status_of["nodeName"] = node  # type: ignore[assignment]
        if status_of["conditions"] != claim.get("status", {}).get("conditions", []):
            self._cluster.patch(self._kind, claim["metadata"]["name"], {"status": status_of}, "status")

    def _is(self, conditions: dict[str, Any], kind: str) -> bool:
        prefix = "Machine" if self._kind == MACHINE else ""
        return bool(conditions.get(prefix + kind, {}).get("status") == "True")

    def _patch(self, claim: dict[str, Any], changes: dict[str, Any]) -> None:
        meta = {"resourceVersion": claim["metadata"]["resourceVersion"], **changes["metadata"]}
        self._cluster.patch(self._kind, claim["metadata"]["name"], {"metadata": meta})


def _node_status(ready: bool, gpus: int) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    said = ("True", "KubeletReady", "kubelet is posting ready status") if ready else (
        "False", "KubeletNotReady", "container runtime network not ready",
    )  # fmt: skip
    room = {"cpu": "24", "memory": "220Gi", "pods": "110", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    ready_condition = dict(zip(("status", "reason", "message"), said, strict=True))
    times = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    return {"conditions": [{"type": "Ready", **ready_condition, **times}], "capacity": room, "allocatable": room}
