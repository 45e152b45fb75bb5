"""What nodes cost: from when they are asked for, for each node, with the boot apart."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kaito_flows.nodes.base import NodeLease
from kaito_flows.nodes.cost import NodeCost, PaidLease

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


def paid(minutes: float, *, boot: float = 4, price: float | None = 6.0, gpus: int = 2, nodes: int = 1) -> PaidLease:
    lease = NodeLease(
        "aks", "w", tuple("abc"[:nodes]), "size", price, gpus=gpus,
        created_at=NOON, ready_at=NOON + timedelta(minutes=boot), expires_at=NOON + timedelta(hours=1),
    )  # fmt: skip
    return PaidLease(lease, NOON + timedelta(minutes=minutes))


def test_a_node_is_paid_from_when_it_is_asked_for_and_its_boot_is_told_apart() -> None:
    cost = NodeCost.of([paid(30)])
    assert (cost.usd, cost.gpu_hours) == (pytest.approx(3.0), pytest.approx(1.0))
    assert (cost.boot_seconds, cost.paid_seconds) == (240, 26 * 60)


def test_each_node_of_a_lease_is_paid_and_leases_add_up() -> None:
    cost = NodeCost.of([paid(30, nodes=3), paid(60)])
    assert (cost.usd, cost.gpu_hours) == (pytest.approx(9 + 6), pytest.approx(3 + 2))
    assert cost.boot_seconds == 480


def test_the_share_of_training_is_of_the_time_after_the_boot() -> None:
    assert NodeCost.of([paid(24)]).trained(18 * 60).training_share == pytest.approx(0.9)
    assert NodeCost().trained(60).training_share is None
    # A run that went on from another one's checkpoint has not trained longer than it had the node.
    assert NodeCost.of([paid(24)]).trained(10_000).training_share == 1.0


def test_what_was_written_is_read_again() -> None:
    cost = NodeCost.of([paid(24)]).trained(600)
    assert NodeCost.from_dict(cost.as_dict()).as_dict() == cost.as_dict()
    assert NodeCost.from_dict(None) == NodeCost()


def test_a_lease_that_nobody_rents_costs_nothing_and_is_held() -> None:
    lease = NodeLease("existing", "w", ("a",), "", 0.0, gpus=4, ready_at=NOON)
    cost = NodeCost.of([PaidLease(lease, NOON + timedelta(hours=1))])
    assert (cost.usd, cost.gpu_hours, cost.paid_seconds, cost.boot_seconds) == (0, 4, 3600, 0)


def test_people_read_it_in_five_lines() -> None:
    rows = {row["item"]: row["value"] for row in NodeCost.of([paid(24)]).trained(18 * 60).rows()}
    assert rows["cost"] == "2.40 USD"
    assert rows["of that in training"] == "90%"


def test_what_has_no_price_has_no_cost_and_says_so() -> None:
    cost = NodeCost.of([paid(30), paid(30, price=None)])
    assert cost.usd is None
    assert cost.rows()[0]["value"] == "not known"
    assert NodeCost.from_dict(cost.as_dict()) == NodeCost.from_dict(NodeCost.from_dict(cost.as_dict()).as_dict())


def test_all_gpus_of_a_rented_node_are_paid_however_many_are_used() -> None:
    lease = replace(paid(60).lease, instance_type="Standard_NC48ads_A100_v4", gpus=1)
    assert NodeCost.of([PaidLease(lease, NOON + timedelta(hours=1))]).gpu_hours == pytest.approx(2)
