"""What becomes of a claim, in Karpenter's words: its conditions, and after it is gone its Events.

    Launched ──► Registered ──► Initialized ──► Ready
    the cloud    the node has    its GPUs and
    has a VM     joined          taints are as wanted

Karpenter tries a launch again when it fails, and removes the claim when there is no capacity (with an Event), when five
minutes of tries have failed, and when the node has not joined after fifteen (without one). Reasons and texts are those
of kubernetes-sigs/karpenter v1 (`pkg/controllers/nodeclaim/lifecycle`), its providers for Azure and AWS, Azure's
gpu-provisioner, and for Machines aws/karpenter-core v0.29.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from kaito_flows.cluster.resources import Object
from kaito_flows.nodes.pools import PoolState

_STEPS = (("Launched", "not launched"), ("Registered", "not registered"), ("Initialized", "not initialized"))
# A launch that has not failed: nobody has tried yet, or it is tried once something else is there.
_BENIGN = frozenset({"", "AwaitingReconciliation", "NodeClassNotReady", "CapacityEvidencePending"})
_PASSING = re.compile(
    r"throttl|TooManyRequests|RequestLimitExceeded|InternalServerError|ServiceUnavailable|context deadline exceeded"
    r"|timed? ?out|connection re|in progress|fail to find the node object",
    re.IGNORECASE,
)
_CODES = (
    ("no-quota", r"quota|exceeding approved|(?<!Request)LimitExceeded|MaxSpotInstanceCount"),
    ("not-authorized", r"unauthori[sz]ed|not authori[sz]ed|AuthorizationFailed|AuthFailure|AccessDenied|forbidden"),
    ("size-not-allowed", r"not (allowed|supported) in your subscription"),
    (
        "size-not-offered",
        r"SKU.?Not.?Available|SKU is unavailable|not available in|not supported|Unsupported"
        r"|NoCompatibleInstanceTypes",
    ),
)
_USUAL = "no-capacity"
# Warnings of a node that is taken down, whoever wants it to be.
_FAREWELL = frozenset({"FailedDraining", "TerminationGracePeriodExpiring", "DisruptionTerminating"})
_REGISTRATION = timedelta(minutes=14)
_MAX_LENGTH = 400


@dataclass(frozen=True, slots=True)
class ClaimState:
    """Where a claim is; why it failed, or what it waits for; and the error's code for a failure."""

    state: PoolState
    reason: str = ""
    code: str = "no-capacity"


def state_of(claim: Object) -> ClaimState:
    """Return where a claim is, by its conditions; a Machine's have `Machine` before their names."""
    if "deletionTimestamp" in claim["metadata"]:
        return ClaimState("deleting", "it is being removed")
    conditions = _conditions(claim)
    if not conditions:
        return ClaimState("creating", "Karpenter has not looked at the claim yet: is it running?")
    for kind, words in _STEPS:
        found = conditions.get(kind, {})
        if found.get("status") == "True":
            continue
        reason = _told(words, found)
        if kind == "Launched" and found.get("reason", "") not in _BENIGN:
            code = code_of(reason)
            if code != _USUAL or not _PASSING.search(reason):
                return ClaimState("failed", reason, code)
        return ClaimState("creating", reason)
    return ClaimState("ready")


def given_up(claim: Object, now: datetime) -> ClaimState | None:
    """Return why Karpenter has removed a claim that it gave up, by its last conditions; None if it had no reason to."""
    conditions = _conditions(claim)
    launched, registered = conditions.get("Launched", {}), conditions.get("Registered", {})
    if launched.get("status") != "True":
        if launched.get("reason", "") in _BENIGN:
            return None
        reason = _told("not launched", launched)
        return ClaimState("failed", reason, code_of(reason))
    if registered.get("status") == "True" or not registered.get("lastTransitionTime"):
        return None
    if now - datetime.fromisoformat(registered["lastTransitionTime"]) < _REGISTRATION:
        return None
    return ClaimState("failed", f"Karpenter has given it up: {_told('not registered', registered)}", "node-not-ready")


def failure_in(events: Sequence[Object]) -> ClaimState | None:
    """Return the failure that the newest warning among a claim's Events tells of; None if there is none."""
    warnings = [e for e in events if e.get("type") == "Warning" and e.get("reason", "") not in _FAREWELL]
    if not warnings:
        return None
    reason = warnings[-1].get("reason", "")
    text = re.sub(r"^(NodeClaim|Machine) \S+ event: ", "", warnings[-1].get("message", ""))
    told = _short(f"{reason}: {text}" if text else reason)
    if reason == "InsufficientCapacityError":
        return ClaimState("failed", told, code_of(text))
    return ClaimState("failed", told, "node-class-not-ready" if reason == "NodeClassNotReady" else "node-removed")


def code_of(text: str) -> str:
    """Return the error's code for what a provider says about a launch that failed."""
    return next((code for code, pattern in _CODES if re.search(pattern, text, re.IGNORECASE)), _USUAL)


def _conditions(claim: Object) -> dict[str, Object]:
    found = claim.get("status", {}).get("conditions") or ()
    return {c["type"].removeprefix("Machine"): c for c in found}


def _told(words: str, condition: Object) -> str:
    said = [part for key in ("reason", "message") if (part := condition.get(key, ""))]
    return _short(": ".join([words, *said]))


def _short(text: str) -> str:
    # Azure's SDK for Go draws lines in its errors.
    text = " ".join(re.sub(r"-{5,}", " ", text).split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} …"
