"""The identity of a run: the same for the same, another for anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kaito_flows.planning.identity import run_identity

RUN: dict[str, Any] = {
    "model_id": "org/model",
    "revision": "main",
    "source": {"kind": "hub", "repo": "org/model"},
    "method": "qlora",
    "config": {"LoraConfig": {"r": 16, "target_modules": ["q_proj", "v_proj"]}, "DataCollator": {"mlm": False}},
    "dataset_digest": "sha256:" + "0" * 64,
    "tuner_version": "0.1.0",
}


def test_it_is_64_hex_digits_and_stays_the_same() -> None:
    assert re.fullmatch("[0-9a-f]{64}", run_identity(**RUN))
    # Written down: adapters that are published are found by it, in other releases too.
    assert run_identity(**RUN) == "c96ff9992881081086f28f43f2aef75e1b4d1c1e02c20698839af5371254b5e3"


def test_the_order_of_keys_does_not_matter() -> None:
    config = {name: dict(reversed(section.items())) for name, section in reversed(RUN["config"].items())}
    assert run_identity(**{**RUN, "config": config}) == run_identity(**RUN)


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "org/other"},
        {"revision": "v2"},
        {"source": {"kind": "hub", "repo": "mirror/model"}},
        {"method": "lora"},
        {"config": {**RUN["config"], "LoraConfig": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}},
        {"config": {**RUN["config"], "LoraConfig": {"r": 16, "target_modules": ["v_proj", "q_proj"]}}},
        {"dataset_digest": "sha256:" + "1" * 64},
        {"tuner_version": "0.2.0"},
    ],
    ids=str,
)
def test_anything_else_is_another_run(change: dict[str, Any]) -> None:
    assert run_identity(**{**RUN, **change}) != run_identity(**RUN)


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        run_identity(**{**RUN, "config": {"TrainingArguments": {"learning_rate": float("nan")}}})
