"""What a Workspace in the cluster asks for: which run, or none, and why not. Plain functions on plain dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kaito_flows.errors import Fault, WorkspaceError
from kaito_flows.workspace import parse_workspace
from kaito_flows.workspace.spec import GUEST_ANNOTATION
from kaito_flows.workspace.validation import placeholders

PREFIX = "kaito-flows/"
SUSPEND = PREFIX + "suspend"
PAUSE = PREFIX + "pause"
RERUN = PREFIX + "rerun"
TAG = "kaito"

# What says whose guest a Workspace is comes from the run that it is for, and from nobody who may only write Workspaces:
# a guest has another namespace's Secrets.
_LEFT_OUT = {"kubectl.kubernetes.io/last-applied-configuration", GUEST_ANNOTATION}
_LONGEST_MESSAGE = 1024  # of a condition, and of an Event

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wish:
    """A Workspace's wish: its run's idempotency key and tags, and whether it shall wait.

    The key is `<uid>:<generation>:<rerun text>`: an edit of the spec or a new text makes a new run, nothing else does.
    """

    namespace: str
    name: str
    uid: str
    generation: int
    rerun: str
    suspended: bool
    paused: bool
    tuning: bool

    @classmethod
    def of(cls, body: Body) -> Wish:
        """Read the wish of a Workspace, valid or not."""
        metadata = body["metadata"]
        annotations = metadata.get("annotations") or {}
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            rerun=annotations.get(RERUN, ""),
            suspended=annotations.get(SUSPEND, "").lower() == "true",
            paused=annotations.get(PAUSE, "").lower() == "true",
            tuning=body.get("tuning") is not None,
        )

    @property
    def key(self) -> str:
        """The idempotency key of its run."""
        text = self.rerun if len(self.rerun) <= 64 else hashlib.sha256(self.rerun.encode()).hexdigest()
        return f"{self.uid}:{self.generation}:{text}"

    @property
    def tags(self) -> list[str]:
        """The tags of its runs."""
        return [TAG, self.own_tag]

    @property
    def own_tag(self) -> str:
        """The tag that only this Workspace's runs have (and those of earlier ones of its name)."""
        return f"workspace:{self.namespace}/{self.name}"

    def owns(self, key: str | None) -> bool:
        """Whether a run with that idempotency key is of this very object."""
        return bool(key and key.startswith(f"{self.uid}:"))

    def is_for(self, key: str | None) -> bool:
        """Whether a run with that idempotency key does what is wished now, resumed or not, here or elsewhere."""
        return bool(key and (key == self.key or key.startswith((f"{self.key}:resumed-", f"{self.key}:elsewhere-"))))


def essence(body: Body) -> dict[str, Any]:
    """What of a Workspace matters to the watcher: while it stays the same, there is nothing to do."""
    metadata = body.get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    ours = {key: annotations[key] for key in (SUSPEND, PAUSE, RERUN) if key in annotations}
    return {"generation": metadata.get("generation", 1), "annotations": ours}


def parameter(body: Body) -> dict[str, Any]:
    """The flow parameter `workspace`: the object, without what only the API server needs, or nobody may claim."""
    metadata = body["metadata"]
    kept = {key: metadata[key] for key in ("name", "namespace", "uid", "generation", "labels") if metadata.get(key)}
    annotations = {k: v for k, v in (metadata.get("annotations") or {}).items() if k not in _LEFT_OUT}
    if annotations:
        kept["annotations"] = annotations
    spec = {key: body[key] for key in ("resource", "tuning", "inference") if body.get(key) is not None}
    return {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": kept, **spec}


def faults_of(body: Body) -> tuple[Fault, ...]:
    """What is wrong with the Workspace as far as it can be seen from here; the run looks at its ConfigMap."""
    document = parameter(body)
    faults = tuple(placeholders(document))
    try:
        parse_workspace(document, "kubernetes")
    except WorkspaceError as exc:
        faults += tuple(fault for fault in exc.faults if fault.code != "config-map-not-found")
    return faults


def message_of(faults: tuple[Fault, ...]) -> str:
    """The faults as a condition's message, which has a longest length."""
    return shortened("; ".join(map(str, faults)))


def shortened(text: str) -> str:
    """The text, not longer than a condition's message or an Event may be."""
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"
