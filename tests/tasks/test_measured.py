"""What trainings took of memory: remembered, found by others of their kind, and the same for a run that comes again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.variables import Variable
from prefect_harness import harness

from kaito_flows.planning.machine import Machine
from kaito_flows.planning.plan import DatasetFacts, Plan, make_plan
from kaito_flows.presets.loader import load_preset, tuning_defaults
from kaito_flows.tasks.measured import keep_memory_share, memory_share

PRESET = "tiny-phi-3"
DATA = DatasetFacts("sha256:" + "a" * 64, 200, 190_000, 10, 9_000, 1024)
NUMBERS = iter(range(1, 1000))


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    with harness(), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture
def plan() -> Plan:
    """Of a kind that no other test has: its length."""
    return planned()


def planned(share: float | None = None, length: int | None = None, **options: Any) -> Plan:
    config = tuning_defaults("qlora")
    config["LoraConfig"]["target_modules"] = list(load_preset(PRESET).linear_modules)
    config["TrainingArguments"]["max_length"] = length or 128 + next(NUMBERS)
    options = {"machine": Machine(16 * 2**30, 4), **options}
    made = make_plan(load_preset(PRESET), "qlora", config, workspace="w", measured=lambda _: share, **options)
    return made.with_dataset(DATA)


def took(plan: Plan, share: float) -> dict[str, Any]:
    """The timings of a job that took that share of what the formulas say."""
    return {"peak_host_bytes": int(plan.memory.total / plan.memory.measured * share)}


def test_the_next_of_its_kind_is_planned_with_what_the_first_took(plan: Plan) -> None:
    assert memory_share(plan.memory_key) is None
    keep_memory_share(plan, took(plan, 0.8), [])
    assert memory_share(plan.memory_key) == pytest.approx(0.8, abs=0.001)
    assert memory_share(planned().memory_key) is None
    value = Variable.get(f"kaito_flows_memory_{plan.memory_key}")
    assert isinstance(value, dict)
    assert (value["model"], value["method"]) == (PRESET, "qlora")
    assert value["device"].startswith("this machine")


def test_only_a_training_that_took_more_says_something_new(plan: Plan) -> None:
    for share in (0.8, 0.5, 0.805, 0.9):
        keep_memory_share(plan, took(plan, share), [])
    value = Variable.get(f"kaito_flows_memory_{plan.memory_key}")
    assert isinstance(value, dict)
    assert [entry["share"] for entry in value["measured"]] == pytest.approx([0.8, 0.9], abs=0.001)


def test_a_run_that_comes_again_is_told_what_it_was_told_before(plan: Plan) -> None:
    """Else it might rent nodes of another size beside those that it has."""

    @flow(name="asks")
    def asks(learns: float) -> tuple[float | None, float | None]:
        before = memory_share(plan.memory_key)
        keep_memory_share(plan, took(plan, learns), [])
        return before, memory_share(plan.memory_key)

    assert asks(0.7) == (None, None)
    first = pytest.approx(0.7, abs=0.001)
    assert asks(0.9) == (first, first)
    assert memory_share(plan.memory_key) == pytest.approx(0.9, abs=0.001)


@pytest.mark.parametrize("event", ["out-of-memory", "recompute-all"])
def test_after_memory_ran_out_the_formulas_are_believed_again(event: str, plan: Plan) -> None:
    keep_memory_share(plan, took(plan, 0.6), [])
    again = planned(0.6, plan.config["TrainingArguments"]["max_length"])
    assert again.memory_key == plan.memory_key
    keep_memory_share(again, took(again, 0.7), [{"event": event, "step": 3}])
    assert memory_share(plan.memory_key) == 1.0


def test_where_memory_ran_out_of_what_the_formulas_say_nothing_is_learned(plan: Plan) -> None:
    keep_memory_share(plan, took(plan, 0.7), [{"event": "out-of-memory", "step": 3}])
    assert memory_share(plan.memory_key) is None


def test_on_a_gpu_it_is_its_tensors_that_count_and_blocks_that_kept_theirs() -> None:
    plan = planned(machine=Machine(16 * 2**30, 4, "NVIDIA A100", 80 * 2**30, 8.0))
    kept = plan.preset.architecture.layers
    formulas = plan.memory.total + kept * plan.memory.kept_block
    comes_and_goes = 2e9 - plan.memory.weights - plan.memory.adapter
    timings = {"peak_host_bytes": 1, "peak_gpu_tensor_bytes": 2 * 10**9, "blocks_recomputed": 0}
    keep_memory_share(plan, timings, [])
    assert memory_share(plan.memory_key) == pytest.approx((2.9e9 + 0.1 * comes_and_goes) / formulas, abs=0.001)


def divided(plan: Plan) -> Plan:
    return replace(plan, place=replace(plan.place, divided=True))


def unpacked(plan: Plan) -> Plan:
    arguments = {**plan.config["TrainingArguments"], "packing": False}
    return replace(plan, config={**plan.config, "TrainingArguments": arguments})


def short(plan: Plan) -> Plan:
    arguments = {**plan.config["TrainingArguments"], "per_device_train_batch_size": DATA.train_rows + 1}
    return replace(plan, config={**plan.config, "TrainingArguments": arguments})


def shared(plan: Plan) -> Plan:
    """By so many processes that each has one row of a step."""
    arguments = {**plan.config["TrainingArguments"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    config = {**plan.config, "TrainingArguments": arguments}
    return replace(plan, config=config, place=replace(plan.place, gpus=8))


def for_a_gpu(plan: Plan) -> Plan:
    return replace(plan, place=replace(plan.place, has_gpu=True))


@pytest.mark.parametrize("other", [divided, unpacked, short, shared, for_a_gpu])
def test_a_peak_that_says_nothing_of_others_is_not_kept(other: Any, plan: Plan) -> None:
    kept = other(plan)
    keep_memory_share(kept, took(plan, 0.8), [])
    assert memory_share(kept.memory_key) is None


@pytest.mark.parametrize(
    "edited", ["x", 3, {"measured": "x"}, {"measured": [{"share": "a lot", "at": "now"}, 7, {"share": 0.5}]}], ids=str
)
def test_what_somebody_wrote_there_is_no_measurement(edited: Any, plan: Plan) -> None:
    Variable.set(f"kaito_flows_memory_{plan.memory_key}", edited)
    assert memory_share(plan.memory_key) is None
    keep_memory_share(plan, took(plan, 0.8), [])
    assert memory_share(plan.memory_key) == pytest.approx(0.8, abs=0.001)


def test_without_a_server_nothing_is_known_and_nothing_fails(plan: Plan) -> None:
    began = time.monotonic()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert memory_share(plan.memory_key) is None
    assert time.monotonic() - began < 10, "at a terminal it is asked once"


def test_a_variable_that_is_full_costs_no_training(plan: Plan) -> None:
    full = {"share": 0.1, "at": "2026-01-01T00:00:00", "workspace": "w" * 4800}
    Variable.set(f"kaito_flows_memory_{plan.memory_key}", {"measured": [full]})
    keep_memory_share(plan, took(plan, 0.8), [])
    assert memory_share(plan.memory_key) == 0.1, "Prefect takes no more than 5000 characters"
