"""Leases as people and programs read them: whose they are, how old, what they have cost so far, until when."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from kaito_flows.nodes.pools import Pool
from kaito_flows.planning.cost import cost_usd
from kaito_flows.planning.skus import find_sku
from kaito_flows.presets.loader import load_skus
from kaito_flows.settings import Settings
from kaito_flows.workspace.status import duration


def price_of(pool: Pool) -> float | None:
    """USD an hour of one node: what the cloud says, else the price list's, which for a spot node is an upper bound."""
    if pool.offer.price_usd_hour is not None:
        return pool.offer.price_usd_hour
    sku = find_sku(pool.offer.instance_type, load_skus())
    return sku.price_usd_hour if sku else None


def cost_so_far(pool: Pool, now: datetime) -> float | None:
    """USD since the pool was asked for or, of one that was kept, since then; None where no price is known."""
    price = price_of(pool)
    if price is None:
        return None
    return cost_usd(max((now - pool.record.created_at).total_seconds(), 0.0), price) * pool.count


def facts(pool: Pool, kind: str, now: datetime) -> dict[str, Any]:
    """One lease, JSON-ready; times in UTC, by the cloud's clock, as `now` is."""
    record, cost = pool.record, cost_so_far(pool, now)
    return {
        "name": pool.name,
        "provider": kind,
        "namespace": record.holder.namespace,
        "workspace": record.holder.workspace,
        "flow_run_id": record.holder.run_id,
        "instance_type": pool.offer.instance_type,
        "spot": pool.offer.spot,
        "zone": pool.offer.zone,
        "nodes": pool.count,
        "state": record.state,
        "pool_state": pool.state,
        "reason": pool.reason,
        "created_at": record.created_at.isoformat(),
        "age_seconds": round((now - record.created_at).total_seconds()),
        "cost_usd": None if cost is None else round(cost, 4),
        "expires_at": None if record.state == "serving" else record.expires_at.isoformat(),
    }


def columns(pool: Pool, now: datetime) -> dict[str, str]:
    """One lease as a row of `kaito-flows nodes`."""
    record, cost = pool.record, cost_so_far(pool, now)
    return {
        "NAME": pool.name,
        "WORKSPACE": f"{record.holder.namespace}/{record.holder.workspace}",
        "SIZE": f"{pool.offer.instance_type}{' (spot)' if pool.offer.spot else ''}",
        "NODES": str(pool.count),
        "STATE": record.state if pool.state == "ready" else f"{record.state}, {pool.state}",
        "AGE": duration((now - record.created_at).total_seconds()),
        "COST": "?" if cost is None else f"{cost:.2f}",
        "EXPIRES": _expires(pool, now),
    }


def nothing_rented(settings: Settings) -> str:
    """What there is to say where the settings rent no nodes."""
    return f"nothing is rented: KAITO_FLOWS_NODES is {settings.nodes}"


def _expires(pool: Pool, now: datetime) -> str:
    if pool.record.state == "serving":
        return "-"
    left = (pool.record.expires_at - now).total_seconds()
    return f"in {duration(left)}" if left > 0 else f"{duration(-left)} ago"
