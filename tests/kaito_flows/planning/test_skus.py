"""Which sizes fit, and what is said of those that do not."""

from __future__ import annotations

import datetime

import pytest

from kaito_flows.errors import PlanError
from kaito_flows.planning.memory import MemoryEstimate
from kaito_flows.planning.skus import candidates, check_instance_type, usable_bytes
from kaito_flows.presets.loader import load_skus

SKUS = load_skus()
NOW = datetime.date(2026, 11, 1)


def needing(gib: float) -> MemoryEstimate:
    return MemoryEstimate(int(gib * 2**30), 0, 0, 0, 0, 0)


def names(gib: float, bf16: bool = True, today: datetime.date = NOW) -> list[str]:
    return [c.sku.name for c in candidates(needing(gib), SKUS, bf16, today=today)]


def test_the_cheapest_that_fits_comes_first() -> None:
    assert names(5)[:2] == ["Standard_NV36ads_A10_v5", "Standard_NC24ads_A100_v4"]
    assert names(30)[0] == "Standard_NC24ads_A100_v4"
    assert names(80)[0] == "Standard_NC40ads_H100_v5"
    prices = [c.price_usd_hour for c in candidates(needing(5), SKUS, True, today=NOW)]
    known = [price for price in prices if price is not None]
    assert known == sorted(known) and prices[: len(known)] == known


def test_one_gpu_must_hold_it_however_many_a_node_has() -> None:
    assert "Standard_NC96ads_A100_v4" not in names(100)  # four of 80 GiB
    assert names(100) == ["Standard_ND96isr_H200_v5"]
    assert names(1000) == []


def test_where_a_model_can_be_divided_the_gpus_of_a_node_count_together() -> None:
    def divided(gpus: int) -> MemoryEstimate:
        return needing(100 / gpus + 10)

    def found(nodes: int = 1) -> dict[str, bool]:
        fitting = candidates(needing(100), SKUS, True, nodes=nodes, divided=divided, today=NOW)
        assert all(candidate.free >= 0 for candidate in fitting)
        return {candidate.sku.name: candidate.divided for candidate in fitting}

    assert found()["Standard_NC48ads_A100_v4"]  # 60 of 74 GiB
    assert not found()["Standard_ND96isr_H200_v5"]  # whole on each
    assert "Standard_NC24ads_A100_v4" not in found()
    assert found(nodes=2)["Standard_NC24ads_A100_v4"]
    assert check_instance_type("Standard_NC48ads_A100_v4", needing(100), SKUS, True, divided=divided, today=NOW)
    with pytest.raises(PlanError, match=r"is too small: 60\.0 GiB needed, 22\.3 GiB usable"):
        check_instance_type("Standard_NV72ads_A10_v5", needing(100), SKUS, True, divided=divided, today=NOW)


def test_a_gpu_gives_less_than_its_name_says() -> None:
    a10 = next(sku for sku in SKUS if sku.name == "Standard_NV36ads_A10_v5")
    assert 22 * 2**30 < usable_bytes(a10) < 22.5 * 2**30  # nvidia-smi shows 22.5 GiB
    assert "Standard_NV36ads_A10_v5" not in names(23)


def test_without_bfloat16_a_t4_is_the_cheapest() -> None:
    assert names(5, bf16=False)[0] == "Standard_NC4as_T4_v3"
    assert not any("T4" in name for name in names(5))


def test_a_size_counts_until_the_day_it_is_retired() -> None:
    before, after = datetime.date(2026, 9, 29), datetime.date(2026, 9, 30)
    assert "Standard_NV12s_v3" in names(5, bf16=False, today=before)
    assert "Standard_NV12s_v3" not in names(5, bf16=False, today=after)


@pytest.mark.parametrize("name", ["Standard_NC24ads_A100_v4", "standard_nc24ads_a100_v4"])
def test_a_size_that_can_is_returned(name: str) -> None:
    found = check_instance_type(name, needing(30), SKUS, True, today=NOW)
    assert found is not None and found.name == "Standard_NC24ads_A100_v4"


@pytest.mark.parametrize("name", ["Standard_NC64ads_B300_v9", "Standard_D8s_v5", "STANDARD_N1"])
def test_a_size_newer_than_the_list_passes_as_kaito_lets_it(name: str) -> None:
    assert check_instance_type(name, needing(30), SKUS, True, today=NOW) is None


@pytest.mark.parametrize(
    ("name", "gib", "bf16", "code", "said"),
    [
        ("Standard_NV36ads_A10_v5", 30, True, "gpu-too-small", "30.0 GiB needed, 22.3 GiB usable"),
        ("Standard_NC4as_T4_v3", 5, True, "no-bf16", "compute capability 7.5"),
        ("Standard_NC12s_v3", 5, True, "no-bf16", "was retired by Azure on 2025-09-30"),
        ("Standard_NC12s_v3", 50, False, "gpu-too-small", "was retired by Azure on 2025-09-30"),
        ("Standard_NC6s_v3", 5, False, "retired-instance-type", "1 x V100, 16 GiB"),
        ("p4d.24xlarge", 5, True, "unknown-instance-type", "'p4d.24xlarge'"),
        ("NC24ads_A100_v4", 5, True, "unknown-instance-type", "unknown size"),
    ],
)
def test_a_size_that_cannot_hears_why_and_what_can(name: str, gib: float, bf16: bool, code: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_instance_type(name, needing(gib), SKUS, bf16, today=NOW)
    assert caught.value.code == code
    assert caught.value.place == "resource.instanceType"
    assert said in caught.value.message
    cheapest = names(gib, bf16)[0]
    assert f"cheapest that can: {cheapest}" in caught.value.hint
    assert "USD/h" in caught.value.hint


def test_a_misspelt_size_hears_of_the_nearest() -> None:
    with pytest.raises(PlanError, match="unknown size") as caught:
        check_instance_type("Standrd_NC24ads_A100_v4", needing(5), SKUS, True, today=NOW)
    assert caught.value.hint.startswith("did you mean Standard_NC24ads_A100_v4?")


def test_what_no_gpu_holds_hears_what_to_change() -> None:
    with pytest.raises(PlanError) as caught:
        check_instance_type("Standard_NC24ads_A100_v4", needing(1000), SKUS, True, today=NOW)
    assert "max_length" in caught.value.hint
