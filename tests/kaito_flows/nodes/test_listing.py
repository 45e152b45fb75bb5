"""Leases as they are listed: what they have cost, and until when they are held."""

from __future__ import annotations

from datetime import timedelta

from fake_cloud import SIZE, FakeCloud

from kaito_flows.nodes.base import Offer
from kaito_flows.nodes.listing import columns, facts
from kaito_flows.planning.skus import find_sku
from kaito_flows.presets.loader import load_skus


def test_a_lease_costs_its_price_for_each_node_since_it_was_asked_for() -> None:
    cloud = FakeCloud()
    pool = cloud.add("kf1", "r", age=30, left=42, offer=Offer(SIZE, 1, spot=True, price_usd_hour=3.0), count=2)
    assert columns(pool, cloud.time) == {
        "NAME": "kf1", "WORKSPACE": "team/w", "SIZE": f"{SIZE} (spot)", "NODES": "2", "STATE": "leased", "AGE": "30m",
        "COST": "3.00", "EXPIRES": "in 42m",
    }  # fmt: skip
    assert facts(pool, "aks", cloud.time) == {
        "name": "kf1", "provider": "aks", "namespace": "team", "workspace": "w", "flow_run_id": "r",
        "instance_type": SIZE, "spot": True, "zone": "", "nodes": 2, "state": "leased", "pool_state": "ready",
        "reason": "", "created_at": "2001-01-01T11:30:00+00:00", "age_seconds": 1800, "cost_usd": 3.0,
        "expires_at": "2001-01-01T12:42:00+00:00",
    }  # fmt: skip


def test_a_price_that_the_cloud_does_not_say_is_the_price_lists_and_else_unknown() -> None:
    cloud, sku = FakeCloud(), find_sku(SIZE, load_skus())
    assert sku is not None and sku.price_usd_hour is not None
    pool = cloud.add("kf1", age=60, offer=Offer(SIZE.lower(), 1))
    assert columns(pool, cloud.time)["COST"] == f"{sku.price_usd_hour:.2f}"
    unknown = cloud.add("kf2", offer=Offer("Standard_Unheard_Of", 1))
    assert columns(unknown, cloud.time)["COST"] == "?"
    assert facts(unknown, "aks", cloud.time)["cost_usd"] is None


def test_one_that_serves_does_not_expire_and_one_that_is_late_says_so() -> None:
    cloud = FakeCloud()
    serving = cloud.add("kf1", state="serving", left=-90)
    assert (columns(serving, cloud.time)["EXPIRES"], facts(serving, "aks", cloud.time)["expires_at"]) == ("-", None)
    late = cloud.add("kf2", left=-90, pool_state="failed")
    assert columns(late, cloud.time)["EXPIRES"] == "1h ago"
    assert columns(late, cloud.time)["STATE"] == "leased, failed"


def test_a_clock_that_went_back_costs_nothing() -> None:
    cloud = FakeCloud()
    pool = cloud.add("kf1", age=0)
    assert columns(pool, cloud.time - timedelta(hours=1))["COST"] == "0.00"
