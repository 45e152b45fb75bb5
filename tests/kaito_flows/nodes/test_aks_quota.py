"""What is known against a size before it is asked for: the region, a restriction, a zone, each quota in numbers."""

from __future__ import annotations

import pytest
from arm import Azure
from arm_fixtures import A100, A100_FAMILY, T4, SteadyClock
from arm_proxy import Fault

from kaito_flows.errors import AccessError, CloudError
from kaito_flows.nodes import Offer
from kaito_flows.nodes.aks import AksPools
from kaito_flows.settings import Settings

LARGE, SMALL, SPOT, ELSEWHERE = Offer(A100), Offer(T4), Offer(A100, spot=True), Offer("Standard_ND96isr_H100_v5")


@pytest.fixture
def aks(azure: Azure, steady: SteadyClock) -> AksPools:
    return AksPools.connect(Settings())


def test_nothing_speaks_against_what_can_be_had(aks: AksPools, azure: Azure) -> None:
    assert aks.against([LARGE, SMALL, SPOT, Offer(A100.lower())], 2) == {}
    assert azure.count() == 3


def test_lists_of_many_pages_are_read_to_their_end(aks: AksPools, azure: Azure) -> None:
    azure.page = 1
    azure.usages["lowPriorityCores"] = [0, 0]
    assert list(aks.against([LARGE, SMALL, SPOT], 1)) == [SPOT]


def test_a_size_that_is_not_in_the_region(aks: AksPools) -> None:
    assert aks.against([ELSEWHERE, LARGE], 1) == {ELSEWHERE: "not offered in eastus"}


def test_a_size_that_is_not_open_to_the_subscription(aks: AksPools, azure: Azure) -> None:
    azure.restrict(A100, "NotAvailableForSubscription")
    (reason,) = aks.against([LARGE], 1).values()
    assert reason.startswith("not open to this subscription in eastus (NotAvailableForSubscription)")


def test_zones(aks: AksPools, azure: Azure) -> None:
    azure.offer(A100, A100_FAMILY, cores=24, limit=48, zones=("1", "2"))
    azure.restrict(A100, "NotAvailableForSubscription", zones=("2",))
    offers = [LARGE, *(Offer(A100, zone=zone) for zone in "123")]
    assert aks.against(offers, 1) == {
        offers[2]: "zone 2 of eastus is not open to this subscription (NotAvailableForSubscription), only 1",
        offers[3]: "not offered in zone 3 of eastus, only in 1, 2",
    }


def test_a_size_that_is_never_spot(aks: AksPools, azure: Azure) -> None:
    azure.sizes[A100]["capabilities"][1]["value"] = "False"
    assert aks.against([LARGE, SPOT], 1) == {SPOT: "cannot be had as spot"}


def test_the_family_is_short_by_a_number(aks: AksPools, azure: Azure) -> None:
    azure.usages[A100_FAMILY] = [24, 48]
    (reason,) = aks.against([LARGE, SMALL, SPOT], 2).values()
    assert "24 vCPUs short: 48 are needed, 24 of 48 are left" in reason
    assert A100_FAMILY in reason
    assert "https://portal.azure.com/" in reason


def test_the_region_is_short_by_a_number(aks: AksPools, azure: Azure) -> None:
    azure.usages["cores"] = [90, 100]
    found = aks.against([LARGE, SMALL], 1)
    assert list(found) == [LARGE]
    assert (
        "the quota Total Regional vCPUs in eastus is 14 vCPUs short: 24 are needed, 10 of 100 are left" in found[LARGE]
    )


def test_both_are_said_when_both_are_short(aks: AksPools, azure: Azure) -> None:
    azure.usages |= {A100_FAMILY: [0, 0], "cores": [100, 100]}
    reason = aks.against([LARGE], 1)[LARGE]
    assert reason.count("24 vCPUs short") == 2


def test_spot_has_a_quota_of_its_own(aks: AksPools, azure: Azure) -> None:
    azure.usages |= {A100_FAMILY: [0, 0], "lowPriorityCores": [80, 100]}
    found = aks.against([LARGE, SPOT], 1)
    assert "Total Regional Spot vCPUs in eastus is 4 vCPUs short" in found[SPOT]
    assert A100_FAMILY in found[LARGE]


def test_a_family_without_a_quota_passes(aks: AksPools, azure: Azure) -> None:
    del azure.usages[A100_FAMILY]
    assert aks.against([LARGE], 1) == {}


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/skus", b'{"value": {}}'),
        ("/skus", b"[]"),
        ("/skus", b'{"value": [3]}'),
        ("/skus", b'{"value": [{"resourceType": "virtualMachines", "name": "%s", "capabilities": 3}]}' % A100.encode()),
        ("/usages", b"<html>"),
        ("/usages", b'{"value": [{"name": {"value": "cores"}, "currentValue": "many", "limit": 3}]}'),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_cloud_error(aks: AksPools, azure: Azure, path: str, raw: bytes) -> None:
    azure.faults = [Fault("GET", 200, path=path, raw=raw)]
    with pytest.raises(CloudError, match=r"Microsoft\.Compute/"):
        aks.against([LARGE], 1)


def test_the_right_to_read_quotas_is_asked_for(aks: AksPools, azure: Azure) -> None:
    message = "The client 'x' does not have authorization to perform action 'Microsoft.Compute/locations/usages/read'"
    azure.faults = [Fault("GET", 403, "AuthorizationFailed", message, path="/usages")]
    with pytest.raises(AccessError, match=r"the right Microsoft\.Compute/locations/usages/read is missing"):
        aks.against([LARGE], 1)


def test_throttling_is_waited_out(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.faults = [Fault("GET", 429, "TooManyRequests", path="/skus", times=2, headers={"Retry-After": "5"})]
    assert aks.against([LARGE], 1) == {}
    assert steady.passed == 10
