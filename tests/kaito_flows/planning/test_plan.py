"""Plans as users see them: what holds, what does not, and what is still open before the data is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.errors import ConfigError, PlanError
from kaito_flows.planning.machine import Machine
from kaito_flows.planning.memory import tuning_memory
from kaito_flows.planning.plan import DatasetFacts, Plan, make_plan, plan_workspace
from kaito_flows.presets.loader import load_preset
from kaito_flows.workspace import load_workspace

Config = Callable[..., dict[str, Any]]
DATA = DatasetFacts("sha256:" + "a" * 64, 200, 190_000, 10, 9_000, 1024)
PHI3, SMOL = "phi-3-mini-128k-instruct", "smollm2-135m-instruct"
A100 = "Standard_NC24ads_A100_v4"


def on_azure(
    config: Config, preset: str = PHI3, size: str | None = A100, method: str = "qlora", **changes: Any
) -> Plan:
    resolved = config(preset, method, **changes)
    return make_plan(load_preset(preset), method, resolved, workspace="w", instance_type=size, platform="kubernetes")


def test_before_the_data_steps_and_cost_are_open_and_the_rest_is_known(config: Config) -> None:
    plan = on_azure(config)
    assert (plan.steps, plan.seconds, plan.cost_usd, plan.identity) == (None, None, None, "")
    assert plan.instance_type == A100
    assert plan.price_usd_hour == 3.673
    assert plan.candidates[0].sku.name == "Standard_NV36ads_A10_v5"
    assert {row["item"]: row["value"] for row in plan.table_rows()}["steps, time, cost"].startswith("known once")


def test_the_data_brings_steps_time_cost_and_identity(config: Config) -> None:
    plan = on_azure(config).with_dataset(DATA)
    assert plan.steps == 300
    assert plan.seconds is not None and plan.cost_usd is not None
    # 3 x 200 rows x 1024 tokens x 15.9 GFLOPs at 40 % of 312 TFLOPs, and twice 10 rows forward
    assert plan.seconds == pytest.approx(3 * 200 * 1024 * 15.9e9 / (0.4 * 312e12), rel=0.03)
    assert plan.cost_usd == pytest.approx(plan.seconds / 3600 * 3.673)
    assert len(plan.identity) == 64
    rows = {row["item"]: row["value"] for row in plan.table_rows()}
    assert rows["steps"] == "300"
    assert rows["price"] == "3.67 USD/h (eastus, 2026-06-18)"


def recomputed(plan: Plan) -> tuple[int, str]:
    rows = {row["item"]: row["value"] for row in plan.table_rows()}
    return plan.blocks_recomputed, rows.get("recomputed", "")


def test_blocks_keep_their_activations_where_the_gpu_has_room_for_them(config: Config, laptop: Machine) -> None:
    assert recomputed(on_azure(config)) == (0, "nothing: the activations of all 32 blocks find room")
    small = on_azure(config, size="Standard_NV36ads_A10_v5", max_length=4096)
    again, shown = recomputed(small)
    assert 0 < again < 32
    assert shown == f"the activations of {again} of 32 blocks"
    assert small.place.usable is not None
    fits = small.memory.needed + (32 - again) * small.memory.kept_block
    assert fits <= small.place.usable < fits + small.memory.kept_block
    all_of_them = (32, "the activations of all 32 blocks")
    assert recomputed(on_azure(config, size="Standard_NV36ads_A10_v5", max_length=40_000)) == all_of_them
    assert recomputed(on_azure(config, size=None)) == all_of_them, "nothing is known of an own node"
    assert recomputed(on_azure(config, gradient_checkpointing=False)) == (0, "")
    here = make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="w", machine=laptop)
    assert recomputed(here)[0] == 30, "without a GPU, others use the memory too"


def test_less_to_compute_again_takes_less_time(config: Config) -> None:
    times = [
        on_azure(config, size="Standard_NV36ads_A10_v5", max_length=length).with_dataset(DATA).seconds
        for length in (1024, 4096, 40_000)
    ]
    assert times == sorted(times)
    assert times[2] / times[0] == pytest.approx(23.2 / 15.9, rel=0.03)


def test_what_was_measured_before_is_planned_with_on_devices_of_its_kind(config: Config, laptop: Machine) -> None:
    asked: list[str] = []

    def measured(key: str) -> float | None:
        asked.append(key)
        return {here.memory_key: 0.5, there.memory_key: 2.0}.get(key)

    here = make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="w", machine=laptop)
    there = on_azure(config, SMOL)
    options: dict[str, Any] = {"workspace": "w", "measured": measured}
    again = make_plan(load_preset(SMOL), "qlora", config(SMOL), machine=laptop, **options)
    assert again.memory.total == pytest.approx(here.memory.total / 2, rel=1e-6)
    [shown] = [row["value"] for row in again.table_rows() if row["item"] == "memory"]
    assert shown.endswith(", as measured (50% of the estimate)")
    free = {candidate.sku.name: candidate.free for candidate in again.candidates}
    options |= {"platform": "kubernetes", "instance_type": A100}
    rented = make_plan(load_preset(SMOL), "qlora", config(SMOL), **options)
    assert rented.memory.total == pytest.approx(2 * there.memory.total, rel=1e-6)
    assert free == {candidate.sku.name: candidate.free for candidate in rented.candidates}
    assert set(asked) == {here.memory_key, there.memory_key}
    assert again.as_dict()["memory_measured"] == 0.5
    assert here.memory_key == again.memory_key


def test_a_gpu_that_was_seen_to_be_too_small_is_refused(config: Config) -> None:
    size = "Standard_NV36ads_A10_v5"
    options: dict[str, Any] = {"workspace": "w", "platform": "kubernetes", "instance_type": size}
    resolved = config(PHI3, max_length=8192)
    make_plan(load_preset(PHI3), "qlora", resolved, **options)
    with pytest.raises(PlanError, match="too small") as refused:
        make_plan(load_preset(PHI3), "qlora", resolved, measured=lambda _: 5.0, **options)
    assert refused.value.code == "gpu-too-small"


def test_a_dataset_given_at_once_is_the_same_plan(config: Config) -> None:
    at_once = make_plan(
        load_preset(PHI3), "qlora", config(PHI3), workspace="w", instance_type=A100, dataset=DATA, platform="kubernetes"
    )
    assert at_once == on_azure(config).with_dataset(DATA)


def test_max_steps_bound_the_time(config: Config) -> None:
    whole, part = on_azure(config).with_dataset(DATA), on_azure(config, max_steps=30).with_dataset(DATA)
    assert part.steps == 30
    assert whole.seconds is not None and part.seconds is not None
    assert part.seconds < whole.seconds / 8


def test_the_identity_is_of_the_training_not_of_the_place(config: Config, laptop: Machine) -> None:
    there = on_azure(config, SMOL).with_dataset(DATA)
    here = make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="other", dataset=DATA, machine=laptop)
    assert here.identity == there.identity
    assert on_azure(config, SMOL, seed=1).with_dataset(DATA).identity != there.identity


def test_weights_from_an_image_are_other_weights(config: Config, laptop: Machine) -> None:
    presets = [load_preset(SMOL).from_image(image) for image in ("", "r/smol@sha256:" + "0" * 64, "r/smol:1")]
    plans = [
        make_plan(preset, "qlora", config(SMOL), workspace="w", dataset=DATA, machine=laptop) for preset in presets
    ]
    assert len({plan.identity for plan in plans}) == 3
    assert presets[0] == load_preset(SMOL)


def test_spellings_of_the_same_targets_are_the_same_run(config: Config) -> None:
    spellings = (["all-linear"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    plans = [on_azure(config, target_modules=names).with_dataset(DATA) for names in spellings]
    assert plans[0].identity == plans[1].identity
    assert plans[0].config["LoraConfig"]["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert plans[0].notes == () and len(plans[1].notes) == 2


def test_the_config_that_was_given_is_not_changed(config: Config) -> None:
    given = config(PHI3, target_modules=["all-linear"])
    make_plan(load_preset(PHI3), "qlora", given, workspace="w", instance_type=A100, platform="kubernetes")
    assert given["LoraConfig"]["target_modules"] == ["all-linear"]


def test_the_plan_is_json_and_the_config_is_yaml(config: Config, laptop: Machine) -> None:
    for plan in (on_azure(config), on_azure(config).with_dataset(DATA)):
        assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()
        assert yaml.safe_load(plan.config_yaml) == {"training_config": plan.config}
        assert all(set(row) == {"item", "value"} and row["value"] for row in plan.table_rows())


@pytest.mark.parametrize(
    ("preset", "size", "changes", "code"),
    [
        ("phi-3-medium-4k-instruct", "Standard_NV36ads_A10_v5", {"method": "lora"}, "gpu-too-small"),
        (PHI3, "Standard_NC12s_v3", {}, "no-bf16"),
        (PHI3, "m5.large", {}, "unknown-instance-type"),
        (PHI3, A100, {"max_length": 200_000}, "sequence-too-long"),
        ("phi-2", A100, {"max_length": 4096}, "sequence-too-long"),
    ],
)
def test_a_plan_that_cannot_hold_is_refused(
    config: Config, preset: str, size: str, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(PlanError) as caught:
        on_azure(config, preset, size, **changes)
    assert caught.value.code == code
    assert caught.value.hint


def test_float16_throughout_lets_a_t4_in(config: Config) -> None:
    plan = on_azure(config, SMOL, "Standard_NC4as_T4_v3", torch_dtype="float16", bnb_4bit_compute_dtype="float16")
    assert plan.candidates[0].sku.name == "Standard_NC4as_T4_v3"


def rows_of(plan: Plan) -> dict[str, str]:
    return {row["item"]: row["value"] for row in plan.table_rows()}


def test_the_gpus_of_a_size_share_the_rows_and_change_the_time_alone(config: Config) -> None:
    batch = {"gradient_accumulation_steps": 4}
    one = on_azure(config, **batch).with_dataset(DATA)
    four = on_azure(config, size="Standard_NC96ads_A100_v4", **batch).with_dataset(DATA)
    assert (one.gpus, four.gpus, four.nodes) == (1, 4, 1)
    assert (four.steps, four.identity) == (one.steps, one.identity)
    assert one.seconds is not None and four.seconds is not None and four.cost_usd is not None
    # four times as fast, but for the 95 % and for the held-out rows, which four do not share evenly
    assert four.seconds == pytest.approx(one.seconds / 4 / 0.95, rel=0.01)
    assert four.cost_usd == pytest.approx(four.seconds / 3600 * 14.692)
    assert rows_of(four)["GPUs"] == "4 (one node), each at 95% of its speed"
    assert "GPUs" not in rows_of(one)
    assert four.notes == ()


def test_all_nodes_train_and_are_paid_for(config: Config) -> None:
    def plan(nodes: int, **changes: Any) -> Plan:
        resolved = config(PHI3, **changes)
        return make_plan(load_preset(PHI3), "qlora", resolved, workspace="w", instance_type=A100, nodes=nodes,
                         platform="kubernetes", dataset=DATA)  # fmt: skip

    one, two = plan(1), plan(2)
    assert one.seconds is not None and two.seconds is not None and two.cost_usd is not None
    assert two.seconds == pytest.approx(one.seconds / 2 / 0.85, rel=0.01)
    assert two.cost_usd == pytest.approx(2 * two.seconds / 3600 * 3.673)
    assert rows_of(two)["device"] == f"2 x {A100} (1 x NVIDIA A100, 80 GiB each)"
    assert rows_of(two)["GPUs"] == "2 (2 nodes with 1 each), each at 85% of its speed"
    assert rows_of(two)["price"] == "7.35 USD/h, 2 nodes of 3.67 (eastus, 2026-06-18)"
    assert json.loads(json.dumps(two.as_dict()))["nodes"] == 2
    # A step of 2 rows keeps 2 GPUs busy: the third brings nothing, and is not said to.
    three = plan(3)
    assert three.seconds == pytest.approx(two.seconds, rel=0.01)
    assert three.notes[0].startswith("a step has 2 rows, so that only 2 of 3 GPUs have work")
    assert plan(3, gradient_accumulation_steps=6).notes == ()


def test_own_nodes_have_as_many_gpus_as_is_told(config: Config) -> None:
    def gpus(told: int | None) -> int:
        plan = make_plan(load_preset(PHI3), "qlora", config(PHI3), workspace="w", gpus=told, platform="kubernetes")
        return plan.gpus

    assert (gpus(None), gpus(2)) == (1, 2)


def test_a_model_for_lora_that_no_gpu_holds_is_divided_among_those_of_the_size(config: Config) -> None:
    falcon, size = "falcon-40b", "Standard_NC48ads_A100_v4"
    plan = on_azure(config, falcon, size, "lora")
    whole = tuning_memory(load_preset(falcon), config(falcon, "lora"), "lora")
    assert plan.shard and plan.as_dict()["shard"]
    assert plan.memory.total < 74 * 2**30 < whole.total
    assert plan.memory.activations == whole.activations
    assert "the model divided among them" in rows_of(plan)["GPUs"]
    assert not on_azure(config, PHI3, size, "lora").shard
    # bitsandbytes' 4-bit weights cannot be divided; and they need not be.
    assert not on_azure(config, falcon, size).shard


@pytest.mark.parametrize("size", [None, "Standard_ND999_v9"])
def test_what_is_not_known_of_a_node_is_said_and_not_made_up(config: Config, size: str | None) -> None:
    plan = on_azure(config, size=size).with_dataset(DATA)
    assert plan.cost_usd is None and plan.price_usd_hour is None and plan.device_memory is None
    assert {row["item"]: row["value"] for row in plan.table_rows()}["cost"] == "not known"
    assert bool(plan.notes) == (size is not None)


def test_an_unknown_target_is_refused_before_anything_else(config: Config) -> None:
    with pytest.raises(ConfigError, match="q_projection"):
        on_azure(config, target_modules=["q_projection"], size="m5.large")


def test_a_dataset_without_rows_is_refused(config: Config) -> None:
    with pytest.raises(PlanError) as caught:
        on_azure(config).with_dataset(DatasetFacts("sha256:" + "0" * 64, 0, 0, 0, 0, 1024))
    assert caught.value.code == "empty-dataset"


def test_this_machine_costs_nothing(config: Config, laptop: Machine) -> None:
    plan = make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="w", dataset=DATA, machine=laptop)
    assert (plan.price_usd_hour, plan.cost_usd, plan.instance_type) == (0.0, 0.0, None)
    assert plan.device == "this machine (4 cores, 16 GiB, no GPU)"
    assert {row["item"]: row["value"] for row in plan.table_rows()}["cost"] == "nothing: this machine"


def test_a_machine_that_is_too_small_is_refused_with_sizes_that_are_not(config: Config, laptop: Machine) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(load_preset("phi-3-medium-4k-instruct"), "lora", config("phi-3-medium-4k-instruct", "lora"),
                  workspace="w", machine=laptop)  # fmt: skip
    assert caught.value.code == "machine-too-small"
    assert A100 in caught.value.hint
    assert "4 cores, 16 GiB" in caught.value.message


def test_here_an_instance_type_is_checked_and_not_used(config: Config, laptop: Machine) -> None:
    def plan(size: str) -> Plan:
        return make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="w", instance_type=size, machine=laptop)

    assert plan(A100).notes == (f"{A100} is not used: this platform runs on this machine",)
    with pytest.raises(PlanError, match="was retired by Azure on 2025-09-30"):
        plan("Standard_NC12s_v3")


def test_a_local_gpu_without_bfloat16_is_refused_for_bfloat16(config: Config) -> None:
    t4 = Machine(2**35, 8, "Tesla T4", 15 * 2**30, 7.5)
    with pytest.raises(PlanError, match="no bfloat16") as caught:
        make_plan(load_preset(SMOL), "qlora", config(SMOL), workspace="w", machine=t4)
    assert caught.value.code == "no-bf16"
    half = config(SMOL, torch_dtype="float16", bnb_4bit_compute_dtype="float16")
    assert make_plan(load_preset(SMOL), "qlora", half, workspace="w", machine=t4).device_memory == 15 * 2**30


def test_a_base_model_is_said_to_have_no_chat_template(config: Config) -> None:
    assert "without a chat template" in on_azure(config, "falcon-7b").notes[0]


def test_the_nodes_of_a_workspace_are_planned(repository_root: Path, tmp_path: Path) -> None:
    text = (repository_root / "examples" / "phi-3-qlora.yaml").read_text()
    (tmp_path / "w.yaml").write_text(text.replace("resource:", "resource:\n  count: 2", 1))
    plan = plan_workspace(load_workspace(tmp_path / "w.yaml", "kubernetes"), "kubernetes")
    assert (plan.nodes, plan.processes) == (2, 2)


def test_kaitos_own_example_can_be_planned(repository_root: Path) -> None:
    file = load_workspace(repository_root / "examples" / "phi-3-qlora.yaml", "kubernetes")
    plan = plan_workspace(file, "kubernetes")
    assert plan.model == {"preset": PHI3, "id": "microsoft/Phi-3-mini-128k-instruct", "revision": "main"}
    assert plan.instance_type == A100
    assert plan.workspace == "workspace-tuning-phi-3"
    # KAITO asks for 72 GiB of GPU memory for this model; packed rows of 1024 tokens need a fraction of that.
    assert plan.memory.total < 8 * 2**30
