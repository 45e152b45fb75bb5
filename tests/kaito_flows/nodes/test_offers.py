"""What could be rented for a plan, in the order in which it is tried."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.errors import PlanError
from kaito_flows.nodes.base import NodeLease, NodeRequest, Offer
from kaito_flows.nodes.offers import budget, offers
from kaito_flows.planning.skus import Candidate
from kaito_flows.presets.loader import load_skus
from kaito_flows.settings import Settings

A10, A100, TWO_A100, H100 = (
    "Standard_NV36ads_A10_v5",
    "Standard_NC24ads_A100_v4",
    "Standard_NC48ads_A100_v4",
    "Standard_NC40ads_H100_v5",
)
SKUS = {sku.name: sku for sku in load_skus()}


def candidates(*names: str, divided: bool = False) -> list[Candidate]:
    return [Candidate(SKUS[name], 1, SKUS[name].price_usd_hour, divided) for name in names]


FITTING = candidates(A10, A100, TWO_A100, H100)


def sizes(found: tuple[Offer, ...]) -> list[str]:
    return [offer.instance_type for offer in found]


def offered(size: str | None, annotations: dict[str, str] | None = None, **settings: Any) -> tuple[Offer, ...]:
    return offers(size, FITTING, annotations or {}, Settings(**settings))


def test_the_size_that_a_workspace_names_is_the_only_one() -> None:
    assert offered(A100) == (Offer(A100, 1, price_usd_hour=3.673),)
    assert offered(A100.upper()) == offered(A100)


def test_without_a_size_all_that_fit_are_offered_cheapest_first() -> None:
    assert sizes(offered(None)) == [A10, A100, TWO_A100, H100]


def test_an_annotation_names_more_sizes() -> None:
    assert sizes(offered(A100, {"kaito-flows/instance-types": f"{H100}, {A10}"})) == [A100, H100, A10]
    assert sizes(offered(A100, {"kaito-flows/instance-types": "*"})) == [A100, A10, TWO_A100, H100]


def test_spot_comes_before_on_demand_and_each_zone_is_tried() -> None:
    found = offered(A10, {"kaito-flows/zones": "1,2"}, capacity="spot,on-demand")
    assert [(o.spot, o.zone) for o in found] == [(True, "1"), (True, "2"), (False, "1"), (False, "2")]
    assert [o.spot for o in offered(A10, {"kaito-flows/capacity": "on-demand"}, capacity="spot")] == [False]
    assert str(found[0]) == f"{A10} (spot) in zone 1"


def test_what_costs_more_than_the_limit_is_not_offered() -> None:
    assert sizes(offered(None, max_price_usd_hour=4)) == [A10, A100]
    with pytest.raises(PlanError, match=r"too-expensive: .*cheapest that fits costs 3.20 USD/h"):
        offered(None, max_price_usd_hour=1)


def test_a_size_whose_training_would_be_another_one_is_not_offered() -> None:
    mixed = [*candidates(A100), *candidates(TWO_A100, divided=True)]
    assert sizes(offers(None, mixed, {}, Settings(), divided=False)) == [A100]
    assert sizes(offers(None, mixed, {}, Settings(), divided=True)) == [TWO_A100]


def test_of_a_size_no_more_gpus_are_used_than_asked_for_and_it_must_have_them() -> None:
    assert offers(TWO_A100, FITTING, {}, Settings(), gpus=1)[0].gpus == 1
    assert sizes(offers(None, FITTING, {}, Settings(), gpus=2)) == [TWO_A100]
    assert [offer.gpus for offer in offers(A10, FITTING, {}, Settings(), gpus=0)] == [0]


def test_a_size_that_nobody_knows_is_offered_as_it_is_named() -> None:
    assert offered("Standard_NC999_v9") == (Offer("Standard_NC999_v9", 1),)


@pytest.mark.parametrize(
    ("annotations", "code", "told"),
    [
        ({"kaito-flows/instance-types": "Standard_NC6"}, "unknown-instance-type", f"cheapest first: {A10}"),
        ({"kaito-flows/capacity": "cheap"}, "invalid-annotation", "'cheap' is not one of on-demand, spot"),
        ({"kaito-flows/capacity": ","}, "invalid-annotation", "is not one of"),
    ],
)
def test_an_annotation_that_cannot_be_meant_is_refused(annotations: dict[str, str], code: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        offered(A100, annotations)
    assert caught.value.code == code
    assert told in str(caught.value)
    assert next(iter(annotations)) in caught.value.place


def test_what_nodes_may_cost_is_for_a_workspace_to_say_or_for_the_settings() -> None:
    assert budget({}, Settings()) is None
    assert budget({}, Settings(max_cost_usd=20)) == 20
    assert budget({"kaito-flows/max-cost-usd": "12.50"}, Settings(max_cost_usd=20)) == 12.5


def test_with_a_budget_a_size_without_a_price_is_not_offered() -> None:
    unpriced = next(sku for sku in load_skus() if sku.price_usd_hour is None and sku.gpus == 1)
    fitting = [*candidates(A10), *candidates(unpriced.name)]
    limit = {"kaito-flows/max-cost-usd": "5"}
    assert sizes(offers(None, fitting, limit, Settings())) == [A10]
    with pytest.raises(PlanError, match="price-not-known"):
        offers("Standard_NC999_v9", fitting, limit, Settings())


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "nan", "inf", "5 USD"])
def test_a_budget_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no amount in USD"):
        budget({"kaito-flows/max-cost-usd": text}, Settings())


def test_after_a_node_was_lost_the_offers_behind_it_are_tried() -> None:
    spot, on_demand = Offer(A10, 1, spot=True), Offer(A10, 1)
    request = NodeRequest("w", offers=(spot, on_demand))
    assert request.after(NodeLease("aks", "w", ("n",), A10, 3.2, spot=True)).offers == (on_demand,)
    assert request.after(NodeLease("aks", "w", ("n",), A10, 3.2)).offers == (spot, on_demand)
    assert request.after(NodeLease("existing", "w", ("n",), "", 0.0)).offers == (spot, on_demand)
