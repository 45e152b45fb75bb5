"""A lease from AKS, from the first offer to the node that is given back, through all that goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from arm import Azure, Failure
from arm_fixtures import A100, A100_FAMILY, T4, PoolNodes, SteadyClock
from arm_proxy import Fault

from kaito_flows.errors import CloudError, LeaseLostError, SchedulingError
from kaito_flows.nodes import NodeLease, NodeRequest, Offer
from kaito_flows.nodes.aks import AksPools
from kaito_flows.nodes.pools import LeaseRecord
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

LARGE, SMALL, SPOT = Offer(A100, 1), Offer(T4, 1), Offer(A100, 1, spot=True)
REQUEST = NodeRequest("tune", gpus=1, namespace="default", run_id="run-1", offers=(LARGE, SMALL))
Rent = Callable[..., RentedNodes]


class Crash(BaseException):
    """The process is gone."""


class Told:
    """What a run was told, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, what: str, facts: dict[str, Any]) -> None:
        self.said.append((what, facts))

    def reasons(self, what: str) -> list[str]:
        return [facts["reason"] for name, facts in self.said if name == what]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def rent(azure: Azure, steady: SteadyClock) -> Rent:
    """A provider as a new process has it, with settings of its own."""
    azure.boot_seconds = 240
    return lambda nodes=None, **settings: RentedNodes(
        AksPools.connect(Settings()),
        nodes or PoolNodes(azure),  # type: ignore[arg-type]
        Settings(**settings),
    )


def lease(nodes: RentedNodes, request: NodeRequest, told: Told, steady: SteadyClock) -> NodeLease:
    return nodes.lease(request, told, steady)  # type: ignore[arg-type]


def keep(nodes: RentedNodes, found: NodeLease, steady: SteadyClock, hours: float) -> NodeLease:
    """Let so many hours pass, and renew the lease as a run does: it looks each half minute."""
    for _ in range(round(hours * 120)):
        steady.sleep(30)
        found = nodes.renew(found, followed=True)
    return found


def test_a_lease_from_check_to_release(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    """With a node that boots for four minutes, eight requests to ARM."""
    nodes = rent()
    assert nodes.check(REQUEST) == {}
    found = lease(nodes, REQUEST, told, steady)
    (pool,) = azure.pools
    assert (found.provider, found.name, found.instance_type, found.gpus) == ("aks", pool, A100, 1)
    assert found.nodes == (f"aks-{pool}-vmss000000",)
    assert found.created_at is not None
    assert found.ready_at is not None
    assert 240 <= (found.ready_at - found.created_at).total_seconds() <= 250
    assert nodes.alive(found)
    for _ in range(60):  # twenty minutes of training
        steady.sleep(20)
        found = nodes.renew(found, followed=True)
    nodes.release(REQUEST.holder)
    assert azure.names() == []
    assert azure.count() == 8, azure.calls


@pytest.mark.parametrize(("hours", "limit"), [(1, 10), (6, 12), (24, 12), (72, 16)])
def test_a_lease_of_a_day_takes_twelve_requests_and_each_day_more_two(
    hours: float, limit: int, rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.update_seconds = 20
    nodes = rent()
    nodes.check(REQUEST)
    keep(nodes, lease(nodes, REQUEST, told, steady), steady, hours)
    nodes.release(REQUEST.holder)
    assert azure.names() == []
    assert azure.count() <= limit, azure.calls


def test_a_lease_never_ends_while_its_run_lives_and_outlives_it_by_no_more_than_is_said(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.update_seconds = 20
    nodes = rent()
    found = lease(nodes, REQUEST, told, steady)
    for _ in range(40 * 60):
        before = found
        found = keep(nodes, found, steady, 1 / 60)
        assert found.created_at is not None
        assert found.expires_at is not None
        left, held = found.expires_at - nodes.cloud.now(), nodes.cloud.now() - found.created_at
        assert left >= timedelta(minutes=14)
        assert left <= max(timedelta(hours=1), min(5 * held, timedelta(days=1)))
        if found != before:
            tags = azure.pools[found.name].body["properties"]["tags"]
            record = LeaseRecord.from_tags(tags)
            assert record is not None
            assert record.expires_at == found.expires_at.replace(microsecond=0)


def test_a_renewal_that_fails_is_made_again_before_the_lease_ends(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    nodes = rent()
    found = lease(nodes, REQUEST, told, steady)
    steady.sleep(45 * 60)
    fault = Fault("PUT", 500, "InternalServerError", times=30)
    azure.faults = [fault]
    failed = 0
    while fault.times:
        try:
            found = keep(nodes, found, steady, 1 / 120)
        except CloudError:
            failed += 1
    assert failed
    found = keep(nodes, found, steady, 1 / 120)
    assert found.expires_at is not None
    assert found.expires_at - nodes.cloud.now() > timedelta(hours=3)


def test_a_run_that_comes_again_renews_with_one_request_that_reads_and_one_that_writes(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.update_seconds = 20
    lease(rent(), REQUEST, told, steady)
    steady.sleep(50 * 60)
    nodes = rent()
    found = lease(nodes, REQUEST, told, steady)
    asked = len(azure.calls)
    assert nodes.renew(found) != found
    assert [method for method, _ in azure.calls[asked:]] == ["GET", "PUT"]


def test_a_renewal_leaves_what_others_have_changed_meanwhile(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.update_seconds = 20
    nodes = rent()
    found = keep(nodes, lease(nodes, REQUEST, told, steady), steady, 1)
    tags = azure.pools[found.name].body["properties"]["tags"]
    azure.change(found.name, count=2, tags={**tags, "cost-center": "42"})
    renewed = keep(nodes, found, steady, 4)
    assert renewed.expires_at is not None
    assert found.expires_at is not None
    assert renewed.expires_at > found.expires_at
    properties = azure.pools[found.name].body["properties"]
    assert (properties["count"], properties["tags"]["cost-center"]) == (2, "42")


@pytest.mark.parametrize("change", [{"run": "run-2"}, {"state": "serving"}, {"owner": "another"}])
def test_a_renewal_leaves_a_pool_that_is_no_longer_its_runs(
    change: dict[str, str], rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    nodes = rent()
    found = keep(nodes, lease(nodes, REQUEST, told, steady), steady, 1)
    tags = azure.pools[found.name].body["properties"]["tags"]
    theirs = {**tags, **{f"kaito-flows-{key}": value for key, value in change.items()}}
    azure.change(found.name, tags=theirs)
    with pytest.raises(LeaseLostError):
        keep(nodes, found, steady, 4)
    assert azure.pools[found.name].body["properties"]["tags"] == theirs


def test_waits_are_told_with_their_reason(rent: Rent, told: Told, steady: SteadyClock) -> None:
    lease(rent(), REQUEST, told, steady)
    assert told.reasons("waiting for the node") == ["no node has joined the cluster: AKS: Creating"]


def test_the_next_size_is_taken_when_quota_is_gone_since_the_check(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    nodes = rent()
    assert nodes.check(REQUEST) == {}
    azure.usages[A100_FAMILY] = [48, 48]
    assert lease(nodes, REQUEST, told, steady).instance_type == T4
    (reason,) = told.reasons("moving on")
    assert "Insufficient vcpu quota requested 24, remaining 0" in reason
    assert len(azure.names()) == 1


def test_what_the_check_speaks_against_is_not_asked_for(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.usages[A100_FAMILY] = [48, 48]
    nodes = rent()
    assert list(nodes.check(REQUEST)) == [str(LARGE)]
    assert lease(nodes, REQUEST, told, steady).instance_type == T4
    assert azure.count("PUT") == 1


def test_a_success_that_turns_failed_is_removed_and_its_reason_told(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.failures = [Failure("AllocationFailed", "We do not have sufficient capacity")]
    states: list[tuple[str, str]] = []
    azure.on_change = lambda name, state: states.append((name, state))
    found = lease(rent(), REQUEST, told, steady)
    assert found.instance_type == T4
    assert told.reasons("moving on") == ["AllocationFailed: We do not have sufficient capacity"]
    assert azure.names() == [found.name]
    failed = states[0][0]
    assert [state for name, state in states if name == failed] == ["Creating", "Failed", "Deleting", "Gone"]


def test_spot_falls_back_to_on_demand(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    azure.failures = [Failure("SkuNotAvailable", "Spot capacity is not available")]
    found = lease(rent(), replace(REQUEST, offers=(SPOT, LARGE)), told, steady)
    assert (found.instance_type, found.spot) == (A100, False)
    assert [facts["offer"] for what, facts in told.said if what == "trying"] == [f"{A100} (spot)", A100]
    (pool,) = azure.pools.values()
    assert "scaleSetPriority" not in pool.body["properties"]


def test_a_node_that_does_not_come_up_is_given_up(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    nodes = PoolNodes(azure)
    nodes.absent = {A100}
    found = lease(rent(nodes, node_ready_seconds=600), REQUEST, told, steady)
    assert found.instance_type == T4
    assert told.reasons("moving on") == ["not ready after 10 min: no node has joined the cluster"]
    assert azure.names() == [found.name]


def test_a_pool_that_is_made_for_ever_is_given_up(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    azure.boot_seconds, azure.abort_seconds = 36000, 5
    with pytest.raises(SchedulingError, match=r"no-node.*node-not-ready: not ready after 5 min"):
        lease(rent(node_ready_seconds=300, capacity_seconds=0), REQUEST, told, steady)
    assert azure.names() == []


def test_nothing_is_left_when_nothing_could_be_had(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    azure.failures = [Failure("AllocationFailed", "none left")] * 20
    with pytest.raises(SchedulingError, match=rf"no-node.*{A100}: no-capacity.*{T4}: no-capacity"):
        lease(rent(capacity_seconds=900), REQUEST, told, steady)
    assert azure.names() == []
    assert azure.count("PUT") >= 4


def test_another_operation_is_waited_for(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    azure.one_at_a_time, azure.update_seconds = True, 45
    other = replace(REQUEST, workspace="other")
    nodes = rent()
    nodes.hand_over(other.holder, lease(nodes, other, Told(), steady).nodes)
    found = lease(rent(), REQUEST, told, steady)
    assert found.name in azure.names()
    assert "Another agentpool operation" in told.reasons("waiting for the cloud")[0]


# --- a process that is killed -----------------------------------------------------------------------------------------


def crash_at(what: str) -> Callable[[str, dict[str, Any]], None]:
    def tell(said: str, _: dict[str, Any]) -> None:
        if said == what:
            raise Crash

    return tell


def test_a_run_that_was_killed_while_it_waited_finds_its_pool(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    with pytest.raises(Crash):
        rent().lease(REQUEST, crash_at("waiting for the node"), steady)
    (pool,) = azure.pools
    assert lease(rent(), REQUEST, told, steady).name == pool
    assert azure.names() == [pool]
    assert azure.count("PUT") == 1


def test_a_run_whose_request_got_no_answer_finds_its_pool(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    azure.faults = [Fault("PUT", cut="after", times=99)]
    with pytest.raises(CloudError):
        lease(rent(), REQUEST, told, steady)
    azure.faults = []
    (pool,) = azure.pools
    assert lease(rent(), REQUEST, told, steady).name == pool
    assert len(azure.names()) == 1


def test_a_run_that_was_killed_before_its_request_leaves_nothing(rent: Rent, azure: Azure, steady: SteadyClock) -> None:
    with pytest.raises(Crash):
        rent().lease(REQUEST, crash_at("trying"), steady)
    assert azure.names() == []


def test_another_run_does_not_take_it(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    first = lease(rent(), REQUEST, told, steady)
    second = lease(rent(), replace(REQUEST, run_id="run-2"), told, steady)
    assert first.name != second.name
    rent().release(replace(REQUEST.holder, run_id="run-2"))
    assert azure.names() == [first.name]


# --- giving back ------------------------------------------------------------------------------------------------------


def test_a_release_that_fails_is_made_again(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    nodes = rent()
    lease(nodes, REQUEST, told, steady)
    azure.faults = [Fault("DELETE", 500, "InternalServerError", times=14)]
    for _ in range(2):
        with pytest.raises(CloudError):
            nodes.release(REQUEST.holder)
    assert len(azure.names()) == 1
    nodes.release(REQUEST.holder)
    assert azure.names() == []
    nodes.release(REQUEST.holder)


def test_only_what_is_ours_is_given_back(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    nodes = rent()
    found = lease(nodes, REQUEST, told, steady)
    tags = azure.pools[found.name].body["properties"]["tags"]
    azure.put_there("system", mode="System")
    azure.put_there("gpu", A100, nodeLabels={"kaito.sh/workspace": "tune"})
    azure.put_there("theirs", A100, tags={**tags, "kaito-flows-owner": "another"})
    azure.put_there("damaged", A100, tags={**tags, "kaito-flows-state": "?"})
    nodes.release(REQUEST.holder)
    nodes.release(replace(REQUEST.holder, run_id=""))
    assert azure.names() == ["damaged", "gpu", "system", "theirs"]


def test_a_node_that_is_kept_is_the_next_runs(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    nodes = rent(grace_seconds=600)
    first = lease(nodes, REQUEST, told, steady)
    nodes.release(REQUEST.holder, keep=True)
    (pool,) = nodes.pools()
    assert pool.record.state == "kept"
    assert (pool.record.expires_at - nodes.cloud.now()).total_seconds() == pytest.approx(600, abs=2)
    asked = azure.count("PUT")
    second = lease(rent(), replace(REQUEST, run_id="run-2"), told, steady)
    assert second.name == first.name
    assert azure.count("PUT") == asked + 1
    (pool,) = nodes.pools()
    assert (pool.record.state, pool.record.holder.run_id) == ("leased", "run-2")


def test_two_runs_that_race_for_a_kept_node_get_one_each(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    nodes = rent(grace_seconds=600)
    first = lease(nodes, REQUEST, told, steady)
    nodes.release(REQUEST.holder, keep=True)
    faster, slower = rent(), rent()
    seen, taken = slower.cloud.pools(), []
    slower.cloud.pools = lambda: seen  # type: ignore[method-assign]
    taken.append(lease(faster, replace(REQUEST, run_id="run-2"), told, steady).name)
    taken.append(lease(slower, replace(REQUEST, run_id="run-3"), told, steady).name)
    assert taken[0] == first.name
    assert taken[1] != first.name


def test_a_node_is_handed_to_the_service_and_the_former_one_given_back(
    rent: Rent, azure: Azure, told: Told, steady: SteadyClock
) -> None:
    nodes = rent()
    first = lease(nodes, REQUEST, told, steady)
    nodes.hand_over(REQUEST.holder, first.nodes)
    nodes.release(REQUEST.holder)
    assert azure.names() == [first.name]
    second = lease(nodes, replace(REQUEST, run_id="run-2"), told, steady)
    nodes.hand_over(replace(REQUEST.holder, run_id="run-2"), second.nodes)
    assert [(pool.name, pool.record.state) for pool in nodes.pools()] == [(second.name, "serving")]
    nodes.release(replace(REQUEST.holder, run_id=""))
    assert azure.names() == []


def test_a_wrong_local_clock_changes_nothing(rent: Rent, azure: Azure, told: Told, steady: SteadyClock) -> None:
    """Azure's is nine hours behind ours, and the lease runs by it."""
    azure.wall = lambda: steady.wall() - 9 * 3600
    nodes = rent()
    found = lease(nodes, REQUEST, told, steady)
    assert found.expires_at is not None
    assert abs(found.expires_at.timestamp() - azure.wall() - 3600) < 300
    assert nodes.renew(found) == found
