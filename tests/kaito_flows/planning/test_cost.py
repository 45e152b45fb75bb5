"""Steps, operations and time, against figures derived and measured elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kaito_flows.planning.cost import (
    cost_usd,
    machine_flops_per_second,
    parallel_share,
    sku_flops_per_second,
    training_flops,
    training_steps,
)
from kaito_flows.planning.machine import Machine
from kaito_flows.presets.loader import load_preset, load_skus

Config = Callable[..., dict[str, Any]]
SMOL = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (100, {}, 150),  # 3 epochs of 100 rows, 2 a step
        (101, {}, 153),  # a begun step counts, in each epoch
        (1, {"num_train_epochs": 1.0}, 1),
        (100, {"num_train_epochs": 0.5}, 25),
        (100, {"num_train_epochs": 1.01}, 51),
        (100, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, 12),
        (100, {"max_steps": 7}, 7),
    ],
)
def test_steps_follow_from_packed_rows(config: Config, rows: int, changes: dict[str, Any], steps: int) -> None:
    assert training_steps(rows, config(SMOL, **changes)) == steps


@pytest.mark.parametrize(
    ("length", "recompute", "gigaflops"),
    [
        (512, False, 15.4), (512, True, 22.8),
        (2048, False, 16.5), (2048, True, 24.2),
        (4096, False, 17.9), (4096, True, 26.0),
    ],
)  # fmt: skip
def test_a_token_of_phi3_takes_the_operations_that_were_derived(length: int, recompute: bool, gigaflops: float) -> None:
    phi3 = load_preset("phi-3-mini-4k-instruct")
    assert training_flops(phi3, 25_165_824, length, recompute=recompute) / 1e9 == pytest.approx(gigaflops, abs=0.06)


def test_two_cores_train_smollm2_as_fast_as_was_measured() -> None:
    two_cores = machine_flops_per_second(Machine(8 * 2**30, 2), load_skus())
    a_token = training_flops(load_preset(SMOL), 4_884_480, 512, recompute=False)
    assert two_cores / a_token == pytest.approx(252, rel=0.1)


@pytest.mark.parametrize(
    ("shown", "tflops"),
    [("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA H100 NVL", 835), ("NVIDIA H100 80GB HBM3", 989),
     ("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", 125)],
)  # fmt: skip
def test_a_local_gpu_is_known_by_what_the_driver_calls_it(shown: str, tflops: float) -> None:
    machine = Machine(2**36, 8, shown, 2**36)
    assert machine_flops_per_second(machine, load_skus()) == pytest.approx(tflops * 1e12 * 0.4)


def test_a_size_that_is_not_known_counts_as_a_slow_one() -> None:
    assert sku_flops_per_second(None) == min(sku_flops_per_second(sku) for sku in load_skus() if sku.bf16)


def test_a_gpu_keeps_less_of_its_speed_the_farther_the_others_are() -> None:
    shares = [parallel_share(1, 1), parallel_share(4, 1), parallel_share(4, 2), parallel_share(4, 2, divided=True)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 4


def test_the_price_is_by_the_hour() -> None:
    assert cost_usd(5400, 4.0) == 6.0
