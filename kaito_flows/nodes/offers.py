"""The nodes that a plan could be run on, in the order in which they are tried: the size that is named, or the cheapest.

Annotations of a Workspace change it: `kaito-flows/instance-types` names more sizes (`A,B`, or `*` for all that fit,
cheapest first), `kaito-flows/capacity` says `spot`, `on-demand` or `spot,on-demand`, `kaito-flows/zones` `1,2`. What
all nodes of a run may cost is `kaito-flows/max-cost-usd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kaito_flows.errors import PlanError
from kaito_flows.nodes.base import Offer
from kaito_flows.planning.plan import Plan
from kaito_flows.planning.serving import ServingPlan
from kaito_flows.planning.skus import Candidate, find_sku
from kaito_flows.presets.loader import load_skus
from kaito_flows.settings import Settings
from kaito_flows.workspace import Workspace

INSTANCE_TYPES = "kaito-flows/instance-types"
CAPACITY = "kaito-flows/capacity"
ZONES = "kaito-flows/zones"

MAX_COST = "kaito-flows/max-cost-usd"

ON_DEMAND, SPOT = "on-demand", "spot"


def offers(
    instance_type: str | None,
    candidates: Sequence[Candidate],
    annotations: Mapping[str, str],
    settings: Settings,
    *,
    divided: bool = False,
    gpus: int | None = None,
) -> tuple[Offer, ...]:
    """Return what could be rented, best first: for each size its spot nodes before the others, zone by zone.

    `candidates` are the sizes that fit, `divided` says that the plan divides the model among a size's GPUs: one that
    would do without is another training then, and the other way round. `gpus` are to be used of each node, and not all
    that it has. A size without a price passes any limit.

    Raises:
        PlanError: (code `unknown-instance-type`) an annotation names a size that does not fit; (code
            `invalid-annotation`) or something that is none; (code `too-expensive`) all cost more than the limit; (code
            `price-not-known`) there is a budget, and nobody knows what they cost.
    """
    named = [instance_type] if instance_type else []
    wanted = [name.strip() for name in annotations.get(INSTANCE_TYPES, "" if named else "*").split(",") if name.strip()]
    fitting = {c.sku.name.lower(): c for c in candidates if c.divided == divided}
    sizes = list(dict.fromkeys(name for word in (*named, *wanted) for name in _sizes(word, named, fitting)))
    capacity = _words(annotations.get(CAPACITY) or settings.capacity, CAPACITY, (ON_DEMAND, SPOT))
    zones = [zone.strip() for zone in (annotations.get(ZONES) or settings.zones).split(",") if zone.strip()] or [""]
    limit = settings.max_price_usd_hour
    found = [
        Offer(size, used, word == SPOT, zone, price)
        for size, there, price in map(_facts, sizes)
        for word in capacity
        for zone in zones
        if (used := there if gpus is None else gpus) <= there
    ]
    if budget(annotations, settings) is not None:
        found = _priced(found)
    affordable = [o for o in found if limit is None or o.price_usd_hour is None or o.price_usd_hour <= limit]
    if found and not affordable:
        cheapest = min(o.price_usd_hour for o in found if o.price_usd_hour is not None)
        raise PlanError(
            f"the cheapest that fits costs {cheapest:.2f} USD/h, and no more than {limit:.2f} may be paid",
            place="resource.instanceType",
            hint="KAITO_FLOWS_MAX_PRICE_USD_HOUR is the limit",
            code="too-expensive",
        )
    return tuple(affordable)


def offers_of(workspace: Workspace, plan: Plan | ServingPlan | None, settings: Settings) -> tuple[Offer, ...]:
    """Return what could be rented for a planned Workspace; without a plan, it brings a pod template of its own.

    Nothing where the settings rent no nodes.

    Raises:
        PlanError: as `offers`.
    """
    if not settings.rents:
        return ()
    return offers(
        (plan.instance_type if plan else None) or workspace.resource.instance_type or None,
        plan.place.candidates if plan else (),
        workspace.metadata.annotations,
        settings,
        divided=plan.place.divided if plan else False,
        gpus=plan.gpus if isinstance(plan, ServingPlan) else workspace.gpus,
    )


def _priced(found: list[Offer]) -> list[Offer]:
    """The offers whose price is known: a budget holds for nothing else."""
    priced = [offer for offer in found if offer.price_usd_hour is not None]
    if found and not priced:
        raise PlanError(
            f"what {found[0].instance_type} costs is not known, so that no budget can hold",
            place="resource.instanceType",
            hint=f"take {MAX_COST} and KAITO_FLOWS_MAX_COST_USD away, or name another size",
            code="price-not-known",
        )
    return priced


def budget(annotations: Mapping[str, str], settings: Settings) -> float | None:
    """Return what a run's nodes may cost in USD; None: there is no limit.

    Raises:
        PlanError: (code `invalid-annotation`) the annotation is no amount.
    """
    text = annotations.get(MAX_COST)
    if text is None:
        return settings.max_cost_usd
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        place = f"metadata.annotations[{MAX_COST}]"
        raise PlanError(f"{text!r} is no amount in USD", place=place, hint='as in "12.50"', code="invalid-annotation")
    return amount


def _sizes(word: str, named: Sequence[str], fitting: Mapping[str, Candidate]) -> list[str]:
    if word == "*":
        return [c.sku.name for c in fitting.values()]
    if word.lower() in fitting:
        return [fitting[word.lower()].sku.name]
    if word in named:  # the plan has looked at it
        sku = find_sku(word, load_skus())
        return [sku.name if sku else word]
    cheapest = ", ".join(c.sku.name for c in list(fitting.values())[:3])
    raise PlanError(
        f"{word} does not fit, or is not known",
        place=f"metadata.annotations[{INSTANCE_TYPES}]",
        hint=f"those that fit, cheapest first: {cheapest}" if cheapest else "no other size fits this plan",
        code="unknown-instance-type",
    )


def _facts(size: str) -> tuple[str, int, float | None]:
    """A size with its GPUs and its price; of one that is not known, that it has enough of them is taken for granted.

    What a spot node costs changes by the hour, and is never more than on demand.
    """
    sku = find_sku(size, load_skus())
    return (sku.name, sku.gpus, sku.price_usd_hour) if sku else (size, 1, None)


def _words(text: str, annotation: str, known: Sequence[str]) -> list[str]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if not words or any(word not in known for word in words):
        raise PlanError(
            f"{text!r} is not one of {', '.join(known)}",
            place=f"metadata.annotations[{annotation}]",
            hint="spot,on-demand tries spot first",
            code="invalid-annotation",
        )
    return list(dict.fromkeys(words))
