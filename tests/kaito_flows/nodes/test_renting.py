"""One way through for every cloud: offers in their order, whose a pool is, and that nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fake_cloud import SIZE, FakeCloud, FakeCluster, service_object

from kaito_flows.errors import AccessError, CapacityError, CloudError, LeaseLostError, SchedulingError
from kaito_flows.nodes import renting
from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

BIG = "Standard_NC40ads_H100_v5"
FIRST, SECOND = Offer(SIZE, 1, price_usd_hour=3.6), Offer(BIG, 1, price_usd_hour=7.0)
SPOT = replace(FIRST, spot=True)

Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits in these tests."""
    for name in ("_NODE_SECONDS", "_BUSY_SECONDS", "_CAPACITY_SECONDS"):
        monkeypatch.setattr(renting, name, 0.001)
    yield


def rented(cloud: FakeCloud, **settings: Any) -> RentedNodes:
    given = {"capacity_seconds": 0, "node_ready_seconds": 5, **settings}
    return RentedNodes(cloud, FakeCluster(cloud), Settings(**given))  # type: ignore[arg-type]


def request(*offers: Offer, run: str = "run-1", **changes: Any) -> NodeRequest:
    return NodeRequest("w", namespace="team", run_id=run, gpus=1, offers=offers or (FIRST, SECOND), **changes)


def lease(nodes: RentedNodes, asked: NodeRequest, told: Told | None = None) -> Any:
    return nodes.lease(asked, lambda what, facts: told.append((what, facts)) if told is not None else None)


def test_the_first_offer_that_can_be_had_is_leased_and_given_back() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    held = lease(nodes, request())
    assert (held.instance_type, held.price_usd_hour, held.provider) == (SIZE, 3.6, "karpenter")
    assert held.nodes == (f"{held.name}-0",)
    assert held.expires_at - cloud.now() == timedelta(hours=1)
    assert nodes.alive(held)
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.alive == []
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.calls.count("delete") == 1


def test_what_cannot_be_had_is_told_and_the_next_offer_taken() -> None:
    cloud, told = FakeCloud(), []
    cloud.faults["create"] = [CapacityError("no A100 in this zone", code="no-capacity")]
    assert lease(rented(cloud), request(), told).instance_type == BIG
    assert [what for what, _ in told] == ["trying", "moving on", "trying"]
    assert told[1][1] == {"offer": SIZE, "code": "no-capacity", "reason": "no A100 in this zone"}
    assert len(cloud.alive) == 1


def test_a_pool_that_turns_out_to_have_failed_is_removed_with_its_reason_told() -> None:
    cloud, told = FakeCloud(boots_at_once=False), []
    looks = 0

    def fail() -> None:
        nonlocal looks
        looks += 1
        name = next(iter(cloud.there))
        cloud.fail(name, "AllocationFailed: the region is full")
        cloud.boots_at_once = True

    cloud.before["look"] = fail
    assert lease(rented(cloud), request(), told).instance_type == BIG
    assert (
        "moving on",
        {"offer": SIZE, "code": "no-capacity", "reason": "AllocationFailed: the region is full"},
    ) in told
    cloud.settle()
    assert [pool.offer.instance_type for pool in cloud.there.values()] == [BIG]
    assert looks == 1


def test_a_node_that_does_not_come_up_is_given_up_with_what_it_waited_for() -> None:
    cloud, told = FakeCloud(boots_at_once=False), []
    with pytest.raises(SchedulingError) as caught:
        lease(rented(cloud, node_ready_seconds=0.05), request(FIRST), told)
    assert caught.value.code == "no-node"
    assert "node-not-ready: not ready after 0 min: no node has joined the cluster" in str(caught.value)
    assert (
        "waiting for the node",
        {"pool": next(iter(cloud.there)), "reason": "no node has joined the cluster"},
    ) in told
    assert cloud.alive == []


def test_none_that_can_be_had_is_an_error_that_tells_of_each() -> None:
    cloud = FakeCloud()
    cloud.refused = {FIRST: "24 vCPUs needed, 0 left of StandardNCADSA100v4Family"}
    cloud.faults["create"] = [CapacityError("full")]
    with pytest.raises(SchedulingError) as caught:
        lease(rented(cloud), request())
    assert f"{SIZE}: 24 vCPUs needed, 0 left" in str(caught.value)
    assert f"{BIG}: no-capacity: full" in str(caught.value)
    assert cloud.there == {}


def test_capacity_is_waited_for_as_long_as_the_settings_say() -> None:
    cloud, told = FakeCloud(), []
    cloud.faults["create"] = [CapacityError("full"), CapacityError("full"), None]
    assert lease(rented(cloud, capacity_seconds=60), request(), told).instance_type == SIZE
    assert "waiting for capacity" in [what for what, _ in told]


def test_what_waiting_does_not_help_is_not_waited_for() -> None:
    cloud, told = FakeCloud(), []
    cloud.faults["create"] = [CapacityError("not in this region", code="size-not-offered")] * 2
    with pytest.raises(SchedulingError, match="size-not-offered: not in this region"):
        lease(rented(cloud, capacity_seconds=600), request(), told)
    assert "waiting for capacity" not in [what for what, _ in told]
    some = FakeCloud()
    some.faults["create"] = [CapacityError("x", code="size-not-offered"), CapacityError("full"), None]
    assert lease(rented(some, capacity_seconds=600), request()).instance_type == BIG


def test_quota_that_is_free_by_now_is_found_while_capacity_is_waited_for() -> None:
    cloud, told = FakeCloud(), []
    cloud.refused = {FIRST: "no quota"}
    cloud.faults["create"] = [CapacityError("full")]
    nodes = rented(cloud, capacity_seconds=600)

    def tell(what: str, facts: dict[str, Any]) -> None:
        told.append(what)
        if what == "waiting for capacity":
            cloud.refused = {}

    assert nodes.lease(request(), tell).instance_type == SIZE
    assert told == ["trying", "moving on", "waiting for capacity", "trying"]


def test_what_a_try_leaves_behind_does_not_keep_a_run_from_the_next() -> None:
    cloud, told = FakeCloud(boots_at_once=False), []

    def fail() -> None:
        cloud.fail(next(iter(cloud.there)), "AllocationFailed")
        cloud.boots_at_once = True

    cloud.before["look"] = fail
    cloud.faults["delete"] = [CloudError("another operation is in progress", code="cloud-busy")]
    nodes = rented(cloud)
    held = lease(nodes, request(), told)
    assert held.instance_type == BIG
    assert "left behind for now" in [what for what, _ in told]
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.alive == []


def test_what_is_short_is_said_before_anything_is_made() -> None:
    cloud = FakeCloud()
    cloud.refused = {FIRST: "no quota"}
    assert rented(cloud).check(request()) == {SIZE: "no quota"}
    cloud.refused |= {SECOND: "not offered here"}
    with pytest.raises(SchedulingError, match=r"none of the sizes can be rented: .*no quota; .*not offered here"):
        rented(cloud).check(request())
    assert "create" not in cloud.calls


def test_a_cloud_that_is_busy_is_asked_again_and_one_that_says_no_is_not() -> None:
    cloud, told = FakeCloud(), []
    cloud.faults["create"] = [CloudError("another operation is in progress", code="cloud-busy")]
    lease(rented(cloud), request(), told)
    assert told[1] == ("waiting for the cloud", {"offer": SIZE, "reason": "another operation is in progress"})
    refusing = FakeCloud()
    refusing.faults["create"] = [AccessError("Microsoft.ContainerService/…/write is missing")]
    with pytest.raises(AccessError):
        lease(rented(refusing), request())
    assert refusing.there == {}


def test_a_run_that_comes_again_finds_the_pool_that_it_had_asked_for() -> None:
    cloud = FakeCloud()
    first = lease(rented(cloud), request())
    again = lease(rented(cloud), request())
    assert (again.name, again.created_at) == (first.name, first.created_at)
    assert cloud.calls.count("create") == 1
    other = lease(rented(cloud), request(run="run-2"))
    assert other.name != first.name


def test_two_runs_of_a_workspace_have_nodes_of_their_own_and_release_only_those() -> None:
    cloud = FakeCloud()
    held = [lease(rented(cloud), request(run=run)) for run in ("run-1", "run-2")]
    rented(cloud).release(Holder("team", "w", "run-1"))
    assert cloud.alive == [held[1].name]
    rented(cloud).release(Holder("team", "w"))
    assert cloud.alive == []


def test_a_pool_on_its_way_out_or_failed_is_followed_by_another() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    first = lease(nodes, request())
    nodes.release(Holder("team", "w", "run-1"))
    second = lease(nodes, request())
    assert second.name != first.name
    cloud.fail(second.name, "evicted")
    third = lease(nodes, request())
    assert len({first.name, second.name, third.name}) == 3
    assert cloud.alive == [third.name]


def test_who_no_longer_wants_a_node_does_not_get_it() -> None:
    cloud, stop = FakeCloud(boots_at_once=False), threading.Event()

    def tell(what: str, facts: dict[str, Any]) -> None:
        if what == "waiting for the node":
            stop.set()

    nodes = rented(cloud)
    with pytest.raises(SchedulingError, match="lease-abandoned"):
        nodes.lease(request(), tell, stop)
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.alive == []


def test_a_node_is_kept_for_the_next_run_where_the_settings_have_a_grace_time() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud, grace_seconds=600)
    first = lease(nodes, request())
    cloud.advance(minutes=20)
    nodes.release(Holder("team", "w", "run-1"), keep=True)
    [pool] = cloud.there.values()
    assert (pool.record.state, pool.record.expires_at - cloud.now()) == ("kept", timedelta(minutes=10))
    other_workspace = NodeRequest("other", namespace="team", run_id="run-9", gpus=1, offers=(FIRST,))
    assert lease(nodes, other_workspace).name != first.name
    cloud.advance(minutes=5)
    second = lease(nodes, request(run="run-2"))
    assert second.name == first.name
    # What it cost since it was kept is the second run's to pay.
    assert cloud.now() - second.created_at == timedelta(minutes=5)
    nodes.release(Holder("team", "w", "run-1"))
    assert second.name in cloud.alive
    nodes.release(Holder("team", "w", "run-2"))
    assert second.name not in cloud.alive


def test_of_two_runs_that_want_a_kept_node_one_gets_it() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud, grace_seconds=600)
    first = lease(nodes, request())
    nodes.release(Holder("team", "w", "run-1"), keep=True)
    won: list[str] = []
    cloud.before["mark"] = lambda: won.append(lease(rented(cloud), request(run="run-3")).name)
    lost = lease(nodes, request(run="run-2"))
    assert won == [first.name]
    assert lost.name != first.name


def test_a_lease_is_renewed_when_a_quarter_of_the_first_is_left_and_not_before() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    held = lease(nodes, request())
    cloud.advance(minutes=44)
    assert nodes.renew(held) is held
    cloud.advance(minutes=2)
    renewed = nodes.renew(held)
    assert renewed.expires_at - cloud.now() == timedelta(hours=1)
    assert cloud.there[held.name].record.expires_at == renewed.expires_at


@pytest.mark.parametrize(
    ("throttles", "lease_minutes", "held_minutes", "lasts_minutes"),
    [
        (False, 60, 3000, 60),
        (True, 60, 46, 5 * 46),
        (True, 60, 255, 5 * 255),
        (True, 60, 500, 24 * 60),
        (True, 10, 25, 5 * 25),
        (True, 300, 226, 5 * 226),
        (True, 2000, 1600, 2000),
    ],
)
def test_a_renewal_adds_five_times_what_was_held_where_the_cloud_throttles_and_a_day_at_most(
    throttles: bool, lease_minutes: float, held_minutes: float, lasts_minutes: float
) -> None:
    cloud = FakeCloud()
    cloud.throttles = throttles
    nodes = rented(cloud, lease_minutes=lease_minutes)
    held = lease(nodes, request())
    cloud.advance(minutes=held_minutes)
    assert nodes.renew(held, followed=True).expires_at - cloud.now() == timedelta(minutes=lasts_minutes)


def test_a_run_that_the_reaper_hears_nothing_of_keeps_short_leases() -> None:
    cloud = FakeCloud()
    cloud.throttles = True
    nodes = rented(cloud)
    held = lease(nodes, request())
    cloud.advance(minutes=500)
    assert nodes.renew(held).expires_at - cloud.now() == timedelta(hours=1)


def test_a_run_that_comes_again_goes_on_from_how_long_its_nodes_are_there() -> None:
    cloud = FakeCloud()
    cloud.throttles = True
    lease(rented(cloud), request())
    cloud.advance(minutes=50)
    nodes = rented(cloud)
    renewed = nodes.renew(lease(nodes, request()), followed=True)
    assert renewed.expires_at - cloud.now() == timedelta(minutes=250)


def test_a_cloud_that_throttles_is_looked_at_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = {}
    for throttles in (True, False):
        cloud = FakeCloud(boots_at_once=False)
        cloud.throttles, cloud.look_seconds = throttles, 120
        clock, at = Clock(), []
        look = cloud.look
        monkeypatch.setattr(renting, "time", clock)
        monkeypatch.setattr(cloud, "look", lambda name: (at.append(clock.minutes), look(name))[1])  # noqa: B023
        monkeypatch.setattr(renting, "_NODE_SECONDS", 3.0)
        with pytest.raises(SchedulingError, match="node-not-ready"):
            rented(cloud, node_ready_seconds=1200).lease(request(FIRST), lambda *_: None, clock)  # type: ignore[arg-type]
        looked_at[throttles] = at[:-1]  # the last is made to clear up
    assert looked_at == {True: [2, 6, 14], False: list(range(2, 21, 2))}


class Clock:
    """Time that passes when somebody waits; also an event that nobody sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @property
    def minutes(self) -> float:
        return self.seconds / 60

    def monotonic(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> bool:
        self.seconds += seconds
        return False


def test_a_lease_that_was_taken_away_cannot_be_renewed() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    held = lease(nodes, request())
    cloud.advance(minutes=50)
    nodes.release(Holder("team", "w"))
    with pytest.raises(LeaseLostError):
        nodes.renew(held)


def test_a_pool_of_another_run_is_not_renewed() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud, grace_seconds=600)
    held = lease(nodes, request())
    nodes.release(Holder("team", "w", "run-1"), keep=True)
    lease(nodes, request(run="run-2"))
    cloud.advance(minutes=50)
    with pytest.raises(LeaseLostError):
        nodes.renew(held)


def test_quota_that_a_run_uses_itself_does_not_keep_it_from_its_own_node() -> None:
    cloud = FakeCloud()
    held = lease(rented(cloud), request())
    cloud.refused = {FIRST: "24 vCPUs short", SECOND: "40 vCPUs short"}
    again = rented(cloud)
    assert again.check(request()) == {BIG: "40 vCPUs short"}
    assert lease(again, request()).name == held.name


def test_quota_that_another_run_of_ours_uses_is_waited_for() -> None:
    cloud, told = FakeCloud(), []
    held = lease(rented(cloud), request(run="other"))
    cloud.refused = {FIRST: "24 vCPUs short", SECOND: "40 vCPUs short"}
    nodes = rented(cloud, capacity_seconds=60)
    assert len(nodes.check(request())) == 2

    def tell(what: str, facts: dict[str, Any]) -> None:
        told.append(what)
        if what == "waiting for capacity":
            del cloud.there[held.name]
            cloud.refused = {}

    assert nodes.lease(request(), tell).instance_type == SIZE
    assert told == ["waiting for capacity", "trying"]


def test_a_run_that_had_taken_a_kept_node_over_finds_it_again() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud, grace_seconds=600)
    first = lease(nodes, request())
    nodes.release(Holder("team", "w", "run-1"), keep=True)
    taken = lease(rented(cloud), request(run="run-2"))
    assert lease(rented(cloud), request(run="run-2")).name == taken.name == first.name
    assert cloud.alive == [first.name]


def test_a_kept_node_is_for_a_run_that_asks_for_the_same_disk_and_labels() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud, grace_seconds=600)
    first = lease(nodes, request(disk_bytes=1))
    nodes.release(Holder("team", "w", "run-1"), keep=True)
    assert lease(rented(cloud), request(run="run-2", disk_bytes=500 << 30)).name != first.name
    assert lease(rented(cloud), request(run="run-3", disk_bytes=1, labels={"a": "b"})).name != first.name
    assert lease(rented(cloud), request(run="run-4", disk_bytes=1)).name == first.name


def test_a_node_whose_service_is_up_is_not_taken_from_it_by_a_run_that_fails_then() -> None:
    cloud = FakeCloud()
    cluster = FakeCluster(cloud)
    nodes = RentedNodes(cloud, cluster, Settings(capacity_seconds=0))  # type: ignore[arg-type]
    held = lease(nodes, request())
    cluster.objects.append(service_object(held.nodes))
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.there[held.name].record.state == "serving"
    nodes.release(Holder("team", "w"))
    assert cloud.alive == []


def test_old_nodes_that_cannot_be_given_back_do_not_keep_the_new_ones_from_the_service() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    old = lease(nodes, request())
    nodes.hand_over(Holder("team", "w", "run-1"), old.nodes)
    new = lease(nodes, request(run="run-2"))
    cloud.faults["delete"] = [CloudError("busy", code="cloud-busy")]
    nodes.hand_over(Holder("team", "w", "run-2"), new.nodes)
    assert cloud.there[new.name].record.state == "serving"
    assert old.name in cloud.alive  # for the reaper: the service is elsewhere


def test_what_was_left_behind_is_removed_while_the_run_goes_on() -> None:
    cloud = FakeCloud(boots_at_once=False)

    def fail() -> None:
        cloud.fail(next(iter(cloud.there)), "AllocationFailed")
        cloud.boots_at_once = True

    cloud.before["look"] = fail
    cloud.faults["delete"] = [CloudError("busy", code="cloud-busy")]
    nodes = rented(cloud)
    held = lease(nodes, request())
    assert len(cloud.alive) == 2
    nodes.renew(held)
    assert cloud.alive == [held.name]


def test_a_lease_lasts_at_first_as_long_as_a_node_may_take_to_come_up() -> None:
    cloud = FakeCloud()
    held = lease(rented(cloud, lease_minutes=5, node_ready_seconds=1200), request())
    assert held.expires_at - cloud.now() == timedelta(minutes=22.5)


def test_nodes_are_left_to_the_service_and_those_it_had_before_are_given_back() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    old = lease(nodes, request())
    nodes.hand_over(Holder("team", "w", "run-1"), old.nodes)
    nodes.release(Holder("team", "w", "run-1"))
    assert cloud.there[old.name].record.state == "serving"
    new = lease(nodes, request(run="run-2"))
    nodes.hand_over(Holder("team", "w", "run-2"), new.nodes)
    assert cloud.alive == [new.name]
    # Said twice, as by a run that comes again.
    nodes.hand_over(Holder("team", "w", "run-2"), new.nodes)
    assert cloud.alive == [new.name]
    nodes.release(Holder("team", "w"))
    assert cloud.alive == []


def test_a_service_that_stayed_where_it_was_keeps_its_nodes() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    old = lease(nodes, request())
    nodes.hand_over(Holder("team", "w", "run-1"), old.nodes)
    new = lease(nodes, request(run="run-2"))
    nodes.hand_over(Holder("team", "w", "run-2"), old.nodes)
    nodes.release(Holder("team", "w", "run-2"))
    assert cloud.alive == [old.name]
    assert new.name != old.name


def test_another_installation_s_pools_are_left_alone() -> None:
    cloud = FakeCloud()
    cloud.add("theirs", "run-1", owner="somebody-else")
    nodes = rented(cloud)
    lease(nodes, request())
    nodes.release(Holder("team", "w"))
    assert cloud.alive == ["theirs"]
    assert [pool.name for pool in nodes.pools() if pool.state != "deleting"] == []


def test_all_nodes_of_a_lease_must_be_there() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    held = lease(nodes, request(count=2))
    assert len(held.nodes) == 2
    assert nodes.alive(held)
    del cloud.there[held.name]
    assert not nodes.alive(held)


def test_a_lost_spot_node_is_followed_by_the_next_offer() -> None:
    cloud = FakeCloud()
    nodes = rented(cloud)
    asked = request(SPOT, FIRST)
    held = lease(nodes, asked)
    assert held.spot
    nodes.release(asked.holder)
    assert not lease(nodes, asked.after(held)).spot


def test_without_anything_to_rent_it_says_what_to_name() -> None:
    asked = NodeRequest("w", namespace="team", run_id="run-1")
    with pytest.raises(SchedulingError, match="there is no size to rent"):
        lease(rented(FakeCloud()), asked)
