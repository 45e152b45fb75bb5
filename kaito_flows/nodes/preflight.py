"""What a plan could be run on, in the order in which it is tried, and what is known against it beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kaito_flows.nodes.base import Offer
from kaito_flows.nodes.opening import open_rented
from kaito_flows.settings import Settings


@dataclass(frozen=True, slots=True)
class Prospect:
    """`count` nodes of an offer at a provider, and what speaks against them; empty: nothing that is known."""

    provider: str
    offer: Offer
    count: int
    against: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the price is for all nodes, and what a spot node costs at most."""
        return {
            "provider": self.provider,
            "instance_type": self.offer.instance_type,
            "nodes": self.count,
            "gpus": self.offer.gpus,
            "spot": self.offer.spot,
            "zone": self.offer.zone,
            "price_usd_hour": self._price,
            "against": self.against,
        }

    def row(self) -> dict[str, str]:
        """As a row for people: `item` and `value`."""
        several = f"{self.count} x " if self.count > 1 else ""
        most = "at most " if self.offer.spot else ""
        price = "price not known" if self._price is None else f"{most}{self._price:.2f} USD/h"
        against = f": cannot be had: {self.against}" if self.against else ""
        return {"item": self.provider, "value": f"{several}{self.offer}, {price}{against}"}

    @property
    def _price(self) -> float | None:
        price = self.offer.price_usd_hour
        return None if price is None else round(price * self.count, 4)


def prospects(settings: Settings, offers: Sequence[Offer], count: int) -> list[Prospect]:
    """Ask each provider that rents about each offer for `count` nodes. Nothing is rented.

    Raises:
        InputError: as `open_nodes`.
        CloudError: a cloud does not answer.
        AccessError: it says no.
    """
    found = []
    for provider in open_rented(settings):
        against = provider.cloud.against(offers, count) if offers else {}
        found += [Prospect(provider.cloud.kind, offer, count, against.get(offer, "")) for offer in offers]
    return found
