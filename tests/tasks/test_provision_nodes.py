"""A run's nodes: asked for early, renewed while it lives, replaced when lost, given back on every way out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cloud import SIZE, FakeCloud, FakeCluster
from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect_harness import harness
from waiting import eventually

from kaito_flows.errors import BudgetError, CapacityError, CloudError, DatasetError, LeaseLostError, SchedulingError
from kaito_flows.nodes import NodeLease, NodeRequest, Offer, renting
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.platforms import Service
from kaito_flows.settings import Settings
from kaito_flows.tasks import provision_nodes as module
from kaito_flows.tasks.progress import listening
from kaito_flows.tasks.provision_nodes import Tenancy, check_nodes

SPOT, ON_DEMAND = Offer(SIZE, 1, spot=True, price_usd_hour=3.6), Offer(SIZE, 1, price_usd_hour=3.6)
REQUEST = NodeRequest("w", namespace="team", run_id="run-1", gpus=1, offers=(SPOT, ON_DEMAND))


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    with harness(), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_NODE_SECONDS", "_BUSY_SECONDS", "_CAPACITY_SECONDS"):
        monkeypatch.setattr(renting, name, 0.01)
    for name in ("provision_nodes", "release_nodes", "check_nodes"):
        monkeypatch.setattr(module, name, getattr(module, name).with_options(retry_delay_seconds=[0.01, 0.01]))


def rented(cloud: FakeCloud, **settings: Any) -> RentedNodes:
    return RentedNodes(cloud, FakeCluster(cloud), Settings(capacity_seconds=0, **settings))  # type: ignore[arg-type]


def run(cloud: FakeCloud, body: Callable[[Tenancy], Any], *, settings: Any = None, **given: Any) -> Any:
    """Do something with a tenancy in a flow run."""

    @flow(name="tenant")
    def tenant() -> Any:
        with Tenancy(REQUEST, rented(cloud, **(settings or {})), **given) as tenancy:
            return body(tenancy)

    return tenant()


def test_nodes_are_had_while_the_run_lasts_and_given_back_after() -> None:
    cloud, warmed, costs = FakeCloud(), [], []
    during: list[list[str]] = []

    def body(tenancy: Tenancy) -> str:
        tenancy.begin()
        lease = tenancy.lease()
        assert tenancy.lease() == lease
        during.append(cloud.alive)
        return lease.name

    name = run(cloud, body, warm_up=lambda lease: warmed.append(lease.name), on_cost=costs.append)
    assert during == [[name]]
    assert warmed == [name]
    assert cloud.alive == []
    assert [cost.gpu_hours > 0 for cost in costs] == [True]


def test_a_run_that_fails_gives_back_what_it_had_not_even_got_yet() -> None:
    cloud = FakeCloud(boots_at_once=False)

    def body(tenancy: Tenancy) -> None:
        tenancy.begin()
        while not cloud.there:
            time.sleep(0.01)
        raise DatasetError("no chat in it")

    began = time.monotonic()
    with pytest.raises(DatasetError):
        run(cloud, body)
    assert cloud.alive == []
    assert time.monotonic() - began < 20, "nobody waited for the node"


def test_a_run_that_is_killed_leaves_its_nodes_to_its_job_and_takes_them_up_again() -> None:
    cloud = FakeCloud()

    class Evicted(BaseException):
        pass

    def killed(tenancy: Tenancy) -> None:
        tenancy.lease()
        raise Evicted

    with pytest.raises(Evicted):
        run(cloud, killed)
    [left] = cloud.alive
    assert run(cloud, lambda tenancy: tenancy.lease().name) == left
    assert cloud.alive == []


def test_who_presses_ctrl_c_gives_the_nodes_back() -> None:
    cloud = FakeCloud()

    def interrupted(tenancy: Tenancy) -> None:
        tenancy.lease()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cloud, interrupted)
    assert cloud.alive == []


def test_a_node_is_paid_and_renewed_from_when_it_is_there_and_not_from_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    cloud, costs = FakeCloud(), []

    def body(tenancy: Tenancy) -> None:
        tenancy.begin()
        eventually(lambda: cloud.alive)
        cloud.advance(minutes=45)
        [name] = cloud.alive
        eventually(lambda: cloud.there[name].record.expires_at - cloud.now() > timedelta(minutes=50))
        time.sleep(0.5)
        raise DatasetError("no chat in it")

    with pytest.raises(DatasetError):
        run(cloud, body, on_cost=costs.append)
    assert costs[0].paid_seconds > 0.5
    assert cloud.alive == []


def test_a_budget_that_is_spent_while_the_data_is_prepared_ends_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    cloud = FakeCloud()

    def body(tenancy: Tenancy) -> None:
        tenancy.begin()
        eventually(lambda: "delete" in cloud.calls)
        tenancy.lease()

    with pytest.raises(BudgetError):
        run(cloud, body, budget_usd=0.00001)
    assert cloud.alive == []


def test_a_service_of_one_pod_does_not_keep_the_several_nodes_of_a_training() -> None:
    cloud = FakeCloud()

    @flow(name="tenant")
    def tenant() -> None:
        with Tenancy(replace(REQUEST, count=4), rented(cloud)) as tenancy:
            assert len(tenancy.lease().nodes) == 4
            with tenancy.for_service() as home:
                nodes = home.lease().nodes
                home.hand_over(Service("w", "http://w", ("m",), "1", adopted=False, nodes=nodes))

    tenant()
    [left] = cloud.alive
    assert (cloud.there[left].count, cloud.there[left].record.state) == (1, "serving")


def test_a_node_that_is_lost_is_followed_by_the_next_offer_and_both_are_paid() -> None:
    cloud, told, costs = FakeCloud(), [], []

    def body(tenancy: Tenancy) -> NodeLease:
        first = tenancy.lease()
        assert first.spot
        assert not tenancy.is_lost()
        del cloud.there[first.name]
        assert tenancy.is_lost()
        return tenancy.lease()

    with listening(lambda stage, event: told.append(event)):
        second = run(cloud, body, on_cost=costs.append)
    assert not second.spot
    assert {"event": "leased", "nodes": [f"{second.name}-0"]} in told
    assert cloud.alive == []
    assert costs[1].gpu_hours > costs[0].gpu_hours


def test_nodes_that_are_taken_away_time_and_again_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES", 2)
    cloud = FakeCloud()

    def body(tenancy: Tenancy) -> None:
        while True:
            cloud.there.pop(tenancy.lease().name)

    with pytest.raises(LeaseLostError, match="too-many-leases: nodes were taken away 2 times"):
        run(cloud, body)
    assert cloud.alive == []


def test_a_lease_is_renewed_as_long_as_the_run_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    cloud = FakeCloud()
    expiries: list[bool] = []

    def body(tenancy: Tenancy) -> None:
        name = tenancy.lease().name
        for fault in (CloudError("away"), None):
            cloud.faults["mark"] = [fault]
            cloud.advance(minutes=45)
            before = cloud.there[name].record.expires_at
            deadline = time.monotonic() + 5
            while cloud.there[name].record.expires_at == before and time.monotonic() < deadline:
                time.sleep(0.01)
            expiries.append(cloud.there[name].record.expires_at > cloud.now())

    run(cloud, body)
    assert expiries == [True, True]
    assert not [thread for thread in threading.enumerate() if thread.name == "lease-keeper" and thread.is_alive()]


@pytest.mark.parametrize(("url", "heartbeat"), [("http://prefect/api", 30), (None, 30), ("http://prefect/api", None)])
def test_a_lease_is_a_long_one_only_where_the_reaper_hears_of_the_run(
    monkeypatch: pytest.MonkeyPatch, url: str | None, heartbeat: int | None
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    prefect = SimpleNamespace(api=SimpleNamespace(url=url), flows=SimpleNamespace(heartbeat_frequency=heartbeat))
    monkeypatch.setattr(module, "get_current_settings", lambda: prefect)
    monkeypatch.setattr(RentedNodes, "renew", lambda _, lease, *, followed: told.append(followed) or lease)

    def body(tenancy: Tenancy) -> None:
        tenancy.lease()
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)

    run(FakeCloud(), body)
    assert set(told) == {url is not None and heartbeat is not None}


def test_a_deletion_that_fails_is_made_again_and_one_that_keeps_failing_fails_no_run() -> None:
    cloud = FakeCloud()
    cloud.faults["delete"] = [CloudError("500"), CloudError("500")]
    run(cloud, lambda tenancy: tenancy.lease().name)
    assert cloud.alive == []
    stubborn = FakeCloud()
    stubborn.faults["delete"] = [CloudError("500")] * 3
    assert run(stubborn, lambda tenancy: tenancy.lease().name) in stubborn.alive


def test_a_node_is_kept_for_the_next_run_only_after_a_success() -> None:
    cloud = FakeCloud()
    run(cloud, lambda tenancy: (tenancy.lease(), tenancy.give_back(keep=True)), settings={"grace_seconds": 600})
    [kept] = cloud.alive
    assert cloud.there[kept].record.state == "kept"

    def fail(tenancy: Tenancy) -> None:
        assert tenancy.lease().name == kept
        raise CapacityError("x")

    with pytest.raises(CapacityError):
        run(cloud, fail, settings={"grace_seconds": 600})
    assert cloud.alive == []


def test_nodes_are_left_to_a_service_that_runs_on_them() -> None:
    cloud = FakeCloud()

    def body(tenancy: Tenancy) -> None:
        tenancy.hand_over(Service("w", "http://w", ("m",), "1", adopted=False, nodes=tenancy.lease().nodes))

    run(cloud, body)
    [left] = cloud.alive
    assert cloud.there[left].record.state == "serving"


def test_a_warm_up_that_fails_fails_nothing() -> None:
    def refuse(lease: NodeLease) -> None:
        raise CloudError("no")

    cloud = FakeCloud()
    assert run(cloud, lambda tenancy: tenancy.lease().name, warm_up=refuse)


def test_what_an_evicted_run_has_paid_is_counted_on() -> None:
    spent, costs = NodeCost(usd=5.0, gpu_hours=2.0), []
    run(FakeCloud(), lambda tenancy: tenancy.lease(), spent=spent, on_cost=costs.append)
    assert costs[0].usd >= 5.0
    assert costs[0].gpu_hours > 2.0


def test_nodes_that_have_cost_their_budget_end_the_job_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    cloud, stopped = FakeCloud(), threading.Event()

    def body(tenancy: Tenancy) -> None:
        tenancy.lease()
        assert stopped.wait(20), "the job runs until it is stopped"
        tenancy.check_budget()

    with pytest.raises(BudgetError, match=r"over-budget: w: nodes may cost 0.00 USD, and 0.00 are spent \(a larger"):
        run(cloud, body, budget_usd=0.0001, stop_job=stopped.set)
    assert cloud.alive == []


def test_a_training_that_is_expected_to_cost_more_than_it_may_is_not_begun() -> None:
    cloud = FakeCloud()
    with pytest.raises(BudgetError, match=r"nodes may cost 5.00 USD, and 6.00 are expected"):
        run(cloud, lambda tenancy: tenancy.check_estimate(6.0), budget_usd=5.0)
    assert "create" not in cloud.calls
    run(cloud, lambda tenancy: tenancy.check_estimate(4.9), budget_usd=5.0)
    # One that goes on from a checkpoint has less to do than the plan says.
    run(cloud, lambda tenancy: tenancy.check_estimate(6.0), budget_usd=5.0, spent=NodeCost(usd=2.0))


def test_what_is_short_is_found_before_anything_is_rented() -> None:
    cloud = FakeCloud()
    cloud.refused = {SPOT: "spot quota: 24 vCPUs needed, 0 left", ON_DEMAND: "24 vCPUs needed, 3 left"}

    @flow(name="checks")
    def checks() -> None:
        check_nodes(REQUEST, rented(cloud))

    with pytest.raises(SchedulingError, match=r"spot quota: 24 vCPUs needed, 0 left.*24 vCPUs needed, 3 left"):
        checks()
    assert "create" not in cloud.calls
