"""The status of a Workspace: conditions as KAITO names them, and the columns that `kubectl get workspace` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

MESSAGE_LENGTH = 1024
ConditionStatus = Literal["True", "False", "Unknown"]

RESOURCE_READY = "ResourceReady"
JOB_STARTED = "JobStarted"
INFERENCE_READY = "InferenceReady"
WORKSPACE_SUCCEEDED = "WorkspaceSucceeded"

_COST = {
    "usd": "usd",
    "gpuHours": "gpu_hours",
    "trainingShare": "training_share",
    "paidSeconds": "paid_seconds",
    "bootSeconds": "boot_seconds",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """One `metav1.Condition`; times are RFC 3339 in UTC."""

    type: str
    status: ConditionStatus
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int = 1


@dataclass(slots=True)
class WorkspaceStatus:
    """What is known of a Workspace: who it is, its conditions, and facts of its last run (adapter, service, cost)."""

    name: str
    api_version: str
    instance_type: str
    created: str = ""
    generation: int = 1
    state: str = "Pending"
    node_count: int = 1
    conditions: dict[str, Condition] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def set(self, type_: str, status: ConditionStatus, reason: str, message: str = "", *, now: str = "") -> None:
        """Set a condition; its transition time moves only when its status changes, as Kubernetes has it."""
        before = self.conditions.get(type_)
        moved = before is None or before.status != status
        time = (now or utc_now()) if moved or before is None else before.last_transition_time
        self.conditions[type_] = Condition(type_, status, reason, message, time, self.generation)

    def value(self, type_: str) -> str:
        """The condition's status, "" while it is not known."""
        return self.conditions[type_].status if type_ in self.conditions else ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> WorkspaceStatus:
        """The inverse of `as_dict`."""
        conditions = {key: Condition(**value) for key, value in raw["conditions"].items()}
        return cls(**{**raw, "conditions": conditions})


def status_resource(status: WorkspaceStatus) -> dict[str, Any]:
    """The `status` of the Workspace's object: KAITO's fields, and ours of the run, the adapter and the service."""
    facts = status.facts
    adapter, service = facts.get("adapter"), facts.get("service")
    run = {"flowRunId": "flow_run_id", "identity": "identity", "step": "step", "steps": "steps", "loss": "loss"}
    found: dict[str, Any] = {
        "observedGeneration": status.generation,
        "state": status.state,
        "targetNodeCount": status.node_count,
        "workerNodes": list(facts.get("nodes", ())),
        "run": {"generation": status.generation, **{ours: facts[key] for ours, key in run.items() if key in facts}},
        "conditions": [
            {
                "type": c.type,
                "status": c.status,
                "reason": c.reason,
                # An empty text in a list that is merged by key is null to older API servers.
                "message": c.message[:MESSAGE_LENGTH] or c.reason,
                "lastTransitionTime": c.last_transition_time,
                "observedGeneration": c.observed_generation,
            }
            for c in status.conditions.values()
        ],
    }
    if adapter:
        # On a volume it has no image of the user's, and an empty text is null to older API servers.
        found["adapter"] = {key: adapter[key] for key in ("image", "digest") if adapter.get(key)}
    if service:
        found["service"] = {"url": service["url"]}
    if cost := facts.get("cost"):
        found["cost"] = {theirs: cost[ours] for theirs, ours in _COST.items() if cost.get(ours) is not None}
    return found


def status_of_resource(found: Mapping[str, Any]) -> WorkspaceStatus:
    """What the Workspace's object says of itself: the inverse of `status_resource`."""
    metadata, raw = found["metadata"], found.get("status") or {}
    run = raw.get("run", {})
    ours = {"flowRunId": "flow_run_id", "identity": "identity", "step": "step", "steps": "steps", "loss": "loss"}
    facts = {
        **{key: run[theirs] for theirs, key in ours.items() if theirs in run},
        **{key: raw[key] for key in ("adapter", "service") if key in raw},
        **({"nodes": raw["workerNodes"]} if raw.get("workerNodes") else {}),
        **({"cost": {key: raw["cost"].get(theirs) for theirs, key in _COST.items()}} if raw.get("cost") else {}),
    }
    conditions = {
        c["type"]: Condition(
            c["type"],
            c["status"],
            c.get("reason", ""),
            c.get("message", ""),
            c["lastTransitionTime"],
            c.get("observedGeneration", 1),
        )
        for c in raw.get("conditions", ())
    }
    return WorkspaceStatus(
        name=metadata["name"],
        api_version=found["apiVersion"],
        instance_type=found.get("resource", {}).get("instanceType", ""),
        created=metadata["creationTimestamp"],
        generation=metadata["generation"],
        state=raw.get("state", "Pending"),
        node_count=found.get("resource", {}).get("count", 1),
        conditions=conditions,
        facts=facts,
    )


def columns(status: WorkspaceStatus, *, now: datetime | None = None) -> dict[str, str]:
    """One row, with KAITO's printer columns of the Workspace's own API version."""
    age = _age(status.created, now or datetime.now(UTC))
    ready = {
        "NAME": status.name,
        "INSTANCE": status.instance_type,
        "RESOURCEREADY": status.value(RESOURCE_READY),
        "INFERENCEREADY": status.value(INFERENCE_READY),
    }
    if status.api_version == "kaito.sh/v1alpha1":
        return {**ready, "WORKSPACEREADY": status.value(WORKSPACE_SUCCEEDED), "AGE": age}
    job = {"JOBSTARTED": status.value(JOB_STARTED), "WORKSPACESUCCEEDED": status.value(WORKSPACE_SUCCEEDED)}
    return {**ready, **job, "STATE": status.state, "TARGETNODECOUNT": str(status.node_count), "AGE": age}


def cost_words(cost: Mapping[str, Any]) -> str:
    """What the last run cost, on one line."""
    share = cost.get("training_share")
    training = "" if share is None else f", {share:.0%} of the paid time training"
    boot = duration(cost.get("boot_seconds") or 0)
    usd = "cost not known" if cost.get("usd") is None else f"{cost['usd']:.2f} USD"
    return f"{usd}, {cost['gpu_hours']:.2f} GPU hours{training}, {boot} until the nodes were ready"


def reason_of(code: str) -> str:
    """An error's code as a condition's reason: `out-of-memory` becomes `OutOfMemory`."""
    return "".join(word.capitalize() for word in code.split("-"))


def utc_now() -> str:
    """The time as Kubernetes writes it: `2026-11-24T01:49:46Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age(created: str, now: datetime) -> str:
    if not created:
        return ""
    return duration((now - datetime.fromisoformat(created)).total_seconds())


def duration(seconds: float) -> str:
    """A time as kubectl shortens it: 45s, 12m, 5h, 3d."""
    whole = int(seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * length or (unit != "m" and whole >= length):
            return f"{whole // length}{unit}"
    return f"{max(whole, 0)}s"
