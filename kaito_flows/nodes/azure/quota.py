"""What speaks against a size before it is asked for: the region, a restriction, a zone, the quota.

By two lists of the compute provider, read as they are documented: `skus` and `usages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from kaito_flows.errors import CloudError
from kaito_flows.nodes.azure.arm import Arm
from kaito_flows.nodes.azure.errors import QUOTAS
from kaito_flows.nodes.base import Offer

_SKUS, _SKUS_VERSION = "providers/Microsoft.Compute/skus", "2021-07-01"
_USAGES, _USAGES_VERSION = "providers/Microsoft.Compute/locations/{}/usages", "2024-07-01"
# The names of quotas that are not a family's: all of a region's cores, and all of its spot cores.
_TOTAL: Final = "cores"
_SPOT: Final = "lowprioritycores"


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


Answer = TypeVar("Answer", bound=_Answer)


class _Capability(_Answer):
    name: str
    value: str


class _LocationInfo(_Answer):
    location: str
    zones: tuple[str, ...] = ()


class _RestrictionInfo(_Answer):
    locations: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()


class _Restriction(_Answer):
    type: str
    reason_code: str = "no reason given"
    restriction_info: _RestrictionInfo = _RestrictionInfo()


class Size(_Answer):
    """A VM size in a region."""

    name: str
    family: str = ""
    capabilities: tuple[_Capability, ...] = ()
    location_info: tuple[_LocationInfo, ...] = ()
    restrictions: tuple[_Restriction, ...] = ()

    def _capability(self, name: str) -> str:
        return next((c.value for c in self.capabilities if c.name == name), "")

    @property
    def cores(self) -> int:
        """Its vCPUs; 0 where Azure does not say."""
        text = self._capability("vCPUs")
        return int(text) if text.isdecimal() else 0

    def against(self, offer: Offer, region: str) -> str:
        """What keeps it from being had here, whatever the quota; empty: nothing."""
        whole = next((r for r in self.restrictions if r.type == "Location"), None)
        if whole is not None:
            return f"not open to this subscription in {region} ({whole.reason_code}): ask Azure's support for it"
        zones = {zone for info in self.location_info if info.location.lower() == region for zone in info.zones}
        if offer.zone and offer.zone not in zones:
            return f"not offered in zone {offer.zone} of {region}, only in {_listed(zones)}"
        closed = [r for r in self.restrictions if r.type == "Zone"]
        shut = {zone: r.reason_code for r in closed for zone in r.restriction_info.zones}
        if offer.zone in shut:
            left = _listed(zones - set(shut))
            return f"zone {offer.zone} of {region} is not open to this subscription ({shut[offer.zone]}), only {left}"
        if offer.spot and self._capability("LowPriorityCapable") == "False":
            return "cannot be had as spot"
        return ""


class _UsageName(_Answer):
    value: str
    localized_value: str = ""


class Usage(_Answer):
    """A quota of a region, and what is used of it, in vCPUs."""

    name: _UsageName
    current_value: int = Field(ge=0)
    limit: int

    def against(self, needed: int, region: str) -> str:
        """What is short of it, in numbers; empty: nothing."""
        left = max(self.limit - self.current_value, 0)
        if needed <= left:
            return ""
        name = self.name.localized_value or self.name.value
        return (
            f"the quota {name} in {region} is {needed - left} vCPUs short: {needed} are needed, "
            f"{left} of {self.limit} are left; more: {QUOTAS}"
        )


def against(arm: Arm, offers: Sequence[Offer], count: int) -> dict[Offer, str]:
    """What speaks against each offer for that many nodes; not in there: nothing that Azure tells beforehand.

    Two requests, and one for the cluster's region.

    Raises:
        AccessError: the role lacks the right to read sizes or quotas.
        CloudError: Azure does not answer, or with nonsense.
    """
    region = arm.region()
    names = {offer.instance_type.lower() for offer in offers}
    listed = arm.read(_SKUS, _SKUS_VERSION, **{"$filter": f"location eq '{region}'"})
    wanted = (sku for sku in listed if sku.get("resourceType") == "virtualMachines")
    sizes = {size.name.lower(): size for size in _each(Size, (s for s in wanted if _name(s) in names), _SKUS)}
    usages = {u.name.value.lower(): u for u in _each(Usage, arm.read(_USAGES.format(region), _USAGES_VERSION), _USAGES)}
    found = {offer: _against(offer, count, sizes.get(offer.instance_type.lower()), usages, region) for offer in offers}
    return {offer: reason for offer, reason in found.items() if reason}


def _against(offer: Offer, count: int, size: Size | None, usages: Mapping[str, Usage], region: str) -> str:
    if size is None:
        return f"not offered in {region}"
    if reason := size.against(offer, region):
        return reason
    quotas = (_SPOT,) if offer.spot else (size.family.lower(), _TOTAL)
    reasons = [usages[quota].against(size.cores * count, region) for quota in quotas if quota in usages]
    return "; ".join(filter(None, reasons))


def _name(sku: Mapping[str, Any]) -> str:
    return str(sku.get("name", "")).lower()


def _each(model: type[Answer], items: Iterable[Mapping[str, Any]], place: str) -> list[Answer]:
    try:
        return [model.model_validate(item) for item in items]
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CloudError(f"Azure's answer makes no sense: {where}: {first['msg']}", place=place) from exc


def _listed(zones: Iterable[str]) -> str:
    return ", ".join(sorted(zones)) or "none"
