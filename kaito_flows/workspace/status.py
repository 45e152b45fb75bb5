"""The status of a Workspace: conditions as KAITO names them, and the columns that `kubectl get workspace` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

ConditionStatus = Literal["True", "False", "Unknown"]

RESOURCE_READY = "ResourceReady"
JOB_STARTED = "JobStarted"
INFERENCE_READY = "InferenceReady"
WORKSPACE_SUCCEEDED = "WorkspaceSucceeded"


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
    return {**ready, **job, "STATE": status.state, "TARGETNODECOUNT": "1", "AGE": age}


def utc_now() -> str:
    """The time as Kubernetes writes it: `2026-11-24T01:49:46Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age(created: str, now: datetime) -> str:
    """The age as kubectl shortens it: 45s, 12m, 5h, 3d."""
    if not created:
        return ""
    seconds = int((now - datetime.fromisoformat(created)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (unit != "m" and seconds >= length):
            return f"{seconds // length}{unit}"
    return f"{max(seconds, 0)}s"
