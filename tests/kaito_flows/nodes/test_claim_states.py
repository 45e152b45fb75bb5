"""Claims' conditions and Events, in the words of Karpenter and its providers: where a claim is, and why it failed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kaito_flows.nodes.claim_states import failure_in, given_up, state_of

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
AWAITING = ("Unknown", "AwaitingReconciliation", "object is awaiting reconciliation")
DONE = ("True", "", "")


def claim(since: datetime = NOW, prefix: str = "", **conditions: tuple[str, str, str]) -> dict[str, Any]:
    told = [
        {
            "type": prefix + kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": since.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        for kind, (status, reason, message) in conditions.items()
    ]
    return {"metadata": {"name": "c"}, "status": {"conditions": told} if told else {}}


def test_a_claim_goes_through_its_steps() -> None:
    seen = [
        state_of(claim()),
        state_of(claim(Launched=AWAITING, Registered=AWAITING, Initialized=AWAITING)),
        state_of(claim(Launched=DONE, Registered=("Unknown", "NodeNotFound", "Node not registered with cluster"))),
        state_of(claim(Launched=DONE, Registered=DONE, Initialized=("Unknown", "StartupTaintsExist", "a=b"))),
        state_of(claim(Launched=DONE, Registered=DONE, Initialized=DONE, Ready=DONE)),
    ]
    assert [(found.state, found.reason) for found in seen] == [
        ("creating", "Karpenter has not looked at the claim yet: is it running?"),
        ("creating", "not launched: AwaitingReconciliation: object is awaiting reconciliation"),
        ("creating", "not registered: NodeNotFound: Node not registered with cluster"),
        ("creating", "not initialized: StartupTaintsExist: a=b"),
        ("ready", ""),
    ]


def test_a_machines_conditions_are_understood() -> None:
    done = {"prefix": "Machine", "Launched": DONE, "Registered": DONE}
    assert state_of(claim(**done, Initialized=DONE)).state == "ready"  # type: ignore[arg-type]
    waits = state_of(claim(**done, Initialized=("False", "NodeNotReady", "Node status is NotReady")))  # type: ignore[arg-type]
    assert (waits.state, waits.reason) == ("creating", "not initialized: NodeNotReady: Node status is NotReady")
    failed = state_of(claim(prefix="Machine", Launched=("False", "LaunchFailed", "creating instance, quota")))
    assert (failed.state, failed.code) == ("failed", "no-quota")


QUOTA = (
    "subscription level on-demand vCPU quota for Standard_NC24ads_A100_v4 has been reached (may try provision an"
    " alternative instance type)"
)
UNAVAILABLE = (
    "the requested SKU is unavailable for instance type Standard_NC24ads_A100_v4 in zone eastus-1 with capacity type"
    " spot, for more details please visit: https://aka.ms/azureskunotavailable"
)
AGENT_POOL = (
    'creating instance, agentPool.BeginCreateOrUpdate for "kf0123456789" failed: PUT https://management.azure.com/s\n'
    f"{'-' * 80}\nRESPONSE 400: 400 Bad Request\nERROR CODE: %s\n{'-' * 80}\n"
)
UNAUTHORIZED = "User is not authorized to perform this operation because no identity-based policy allows it"


@pytest.mark.parametrize(
    ("reason", "message", "code"),
    [
        ("SubscriptionQuotaReached", QUOTA, "no-quota"),
        ("LaunchFailed", AGENT_POOL % "ErrCode_InsufficientVCPUQuota", "no-quota"),
        ("LaunchFailed", "exceeding approved Total Regional Cores quota, Current Limit: 500", "no-quota"),
        ("LaunchFailed", "VcpuLimitExceeded: You have requested more vCPU capacity", "no-quota"),
        ("SKUNotAvailable", UNAVAILABLE, "size-not-offered"),
        ("LaunchFailed", AGENT_POOL % "BadRequest VM size X is not allowed in your subscription", "size-not-allowed"),
        ("AllocationFailure", "unable to allocate resources with selected VM size (X)", "no-capacity"),
        ("ZonalAllocationFailure", "unable to allocate resources in the selected zone (eastus-1)", "no-capacity"),
        ("LaunchFailed", "all requested instance types were unavailable during launch", "no-capacity"),
        ("Unauthorized", UNAUTHORIZED, "not-authorized"),
        ("UnauthorizedError", "", "not-authorized"),
        ("LaunchFailed", AGENT_POOL % "AuthorizationFailed", "not-authorized"),
        ("LaunchFailed", "creating instance, something new", "no-capacity"),
    ],
)
def test_a_launch_that_fails_fails_the_claim_with_its_cause(reason: str, message: str, code: str) -> None:
    found = state_of(claim(Launched=("Unknown", reason, message), Registered=AWAITING, Initialized=AWAITING))
    assert (found.state, found.code) == ("failed", code)
    assert found.reason.startswith(f"not launched: {reason}")
    assert "-----" not in found.reason and "\n" not in found.reason


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("LaunchFailed", "creating instance, TooManyRequests: retry after 5 s"),
        ("LaunchFailed", "creating instance, throttled"),
        ("LaunchFailed", "Post https://x: context deadline exceeded"),
        ("LaunchFailed", "fail to find the node object"),
        ("NodeClassNotReady", "NodeClass is not ready"),
        ("CapacityEvidencePending", "the cloud provider deferred the launch"),
    ],
)
def test_a_launch_that_karpenter_tries_again_is_waited_for_with_its_reason(reason: str, message: str) -> None:
    found = state_of(claim(Launched=("Unknown", reason, message)))
    assert (found.state, found.reason) == ("creating", f"not launched: {reason}: {message}")


def test_a_claim_on_its_way_out_is_being_removed_whatever_else_it_says() -> None:
    leaving = claim(Launched=("Unknown", "LaunchFailed", "quota"))
    leaving["metadata"]["deletionTimestamp"] = "2026-11-25T12:00:00Z"
    assert state_of(leaving).state == "deleting"


def event(reason: str, message: str = "", kind: str = "Warning") -> dict[str, Any]:
    return {"type": kind, "reason": reason, "message": message}


def test_the_newest_warning_says_why_a_claim_is_gone() -> None:
    capacity = event("InsufficientCapacityError", f"NodeClaim kf01 event: creating instance, {QUOTA}")
    found = failure_in([event("NodeClassNotReady", "before"), event("Launched", kind="Normal"), capacity])
    assert found is not None
    assert (found.state, found.code) == ("failed", "no-quota")
    assert found.reason == f"InsufficientCapacityError: creating instance, {QUOTA}"
    other = failure_in([event("SpotInterrupted", "Spot interruption warning was triggered")])
    assert other is not None
    assert (other.code, other.reason) == ("node-removed", "SpotInterrupted: Spot interruption warning was triggered")
    unready = failure_in([event("NodeClassNotReady", "NodeClaim c event: no subnets")])
    assert unready is not None and unready.code == "node-class-not-ready"


def test_events_of_a_node_that_is_taken_down_are_no_failure() -> None:
    assert failure_in([]) is None
    assert failure_in([event("FailedDraining"), event("Unconsolidatable", kind="Normal")]) is None


def test_karpenter_gives_up_a_claim_that_was_not_launched_or_whose_node_did_not_join() -> None:
    throttled = given_up(claim(Launched=("Unknown", "LaunchFailed", "creating instance, throttled")), NOW)
    assert throttled is not None
    assert (throttled.code, throttled.reason) == (
        "no-capacity",
        "not launched: LaunchFailed: creating instance, throttled",
    )
    absent = claim(Launched=DONE, Registered=("Unknown", "NodeNotFound", "Node not registered with cluster"))
    late = given_up(absent, NOW + timedelta(minutes=15))
    assert late is not None
    assert (late.code, late.reason) == (
        "node-not-ready",
        "Karpenter has given it up: not registered: NodeNotFound: Node not registered with cluster",
    )
    assert given_up(absent, NOW + timedelta(minutes=5)) is None, "somebody else has removed it"


def test_a_claim_that_was_well_was_removed_by_somebody() -> None:
    assert given_up(claim(Launched=AWAITING, Registered=AWAITING), NOW + timedelta(hours=1)) is None
    assert given_up(claim(Launched=DONE, Registered=DONE), NOW + timedelta(hours=1)) is None
    assert given_up(claim(), NOW) is None
