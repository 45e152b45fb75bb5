"""Several providers in a row: each is asked, and what was leased goes back to whoever leased it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fake_cloud import SIZE, FakeCloud, FakeCluster

from kaito_flows.errors import CapacityError, SchedulingError
from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.chain import Chain
from kaito_flows.nodes.existing import ExistingNodes
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

HOLDER = Holder("team", "w", "run-1")
REQUEST = NodeRequest("w", namespace="team", run_id="run-1", gpus=1, offers=(Offer(SIZE, 1, price_usd_hour=3.6),))


def chain(*clouds: FakeCloud, own: Any = None) -> Chain:
    settings = Settings(capacity_seconds=0)
    rented = {c.kind: RentedNodes(c, FakeCluster(c), settings) for c in clouds}  # type: ignore[arg-type]
    return Chain({"existing": ExistingNodes(own or FakeCluster()), **rented})  # type: ignore[dict-item]


def lease(nodes: Chain, told: list[tuple[str, dict[str, Any]]] | None = None) -> Any:
    return nodes.lease(REQUEST, lambda what, facts: told.append((what, facts)) if told is not None else None)


def test_own_nodes_come_before_rented_ones() -> None:
    own, cloud = FakeCloud("own"), FakeCloud("aks")
    own.add("mine", "run-0")
    assert lease(chain(cloud, own=FakeCluster(own))).provider == "existing"
    assert cloud.there == {}


def test_without_own_nodes_one_is_rented_and_given_back() -> None:
    cloud, told = FakeCloud("aks"), []
    nodes = chain(cloud)
    held = lease(nodes, told)
    assert held.provider == "aks"
    assert told[0][0] == "moving on"
    assert "no node has the labels" in told[0][1]["reason"]
    assert nodes.alive(held)
    assert nodes.renew(held) is held
    nodes.hand_over(HOLDER, held.nodes)
    nodes.release(HOLDER)
    assert cloud.alive == [held.name]
    nodes.release(Holder("team", "w"))
    assert cloud.alive == []


def test_one_cloud_is_tried_after_the_other() -> None:
    full, other = FakeCloud("karpenter"), FakeCloud("aks")
    full.faults["create"] = [CapacityError("full")]
    assert lease(chain(full, other)).provider == "aks"


def test_when_none_has_a_node_each_says_why() -> None:
    full = FakeCloud("aks")
    full.faults["create"] = [CapacityError("full")]
    with pytest.raises(SchedulingError) as caught:
        lease(chain(full))
    assert caught.value.code == "no-node"
    assert "no node has the labels" in str(caught.value)
    assert "no-capacity: full" in str(caught.value)


def test_what_one_provider_cannot_rent_is_no_fault_while_another_may_have_it() -> None:
    poor = FakeCloud("aks")
    poor.refused = {REQUEST.offers[0]: "no quota"}
    assert "no quota" in chain(poor).check(REQUEST)["aks"]


def test_who_gave_up_waiting_is_not_offered_another() -> None:
    slow, other, stop = FakeCloud("karpenter", boots_at_once=False), FakeCloud("aks"), threading.Event()

    def tell(what: str, facts: dict[str, Any]) -> None:
        if what == "waiting for the node":
            stop.set()

    with pytest.raises(SchedulingError, match="lease-abandoned"):
        chain(slow, other).lease(REQUEST, tell, stop)
    assert other.there == {}
