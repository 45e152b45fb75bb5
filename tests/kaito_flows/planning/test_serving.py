"""Plans of services: what fits, how long prompts may be, and what is said of those that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.errors import PlanError
from kaito_flows.planning.machine import Machine
from kaito_flows.planning.serving import ServingPlan, make_serving_plan, plan_serving
from kaito_flows.planning.serving_memory import cache_bytes, serving_memory
from kaito_flows.presets.loader import load_preset
from kaito_flows.workspace import InferenceConfig, load_workspace

PHI3, SMOL, FALCON = "phi-3-mini-128k-instruct", "smollm2-135m-instruct", "falcon-40b"
A10, A100, TWO_A100 = "Standard_NV36ads_A10_v5", "Standard_NC24ads_A100_v4", "Standard_NC48ads_A100_v4"


def on_azure(preset: str = PHI3, size: str | None = A100, config: str | None = None, **more: Any) -> ServingPlan:
    return make_serving_plan(
        load_preset(preset), workspace="w", config=InferenceConfig.resolve(config), instance_type=size,
        platform="kubernetes", **more,
    )  # fmt: skip


def rows_of(plan: ServingPlan) -> dict[str, str]:
    return {row["item"]: row["value"] for row in plan.table_rows()}


# --- memory


def test_a_token_takes_as_much_cache_as_was_published() -> None:
    # Kwon et al. 2023: 800 KB for OPT-13B, which has 40 layers of 40 heads with 128 features
    opt = load_preset(PHI3).architecture.model_copy(
        update={"hidden_size": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "head_dim": 128}
    )
    assert cache_bytes(load_preset(PHI3).model_copy(update={"architecture": opt}), 1) == 800 * 1024


def test_weights_are_whole_and_in_two_bytes() -> None:
    phi3 = load_preset(PHI3)
    made = serving_memory(phi3, max_model_len=4096)
    assert made.weights == 2 * phi3.parameters.total
    assert (made.adapters, made.cache) == (0, cache_bytes(phi3, 4096))
    assert serving_memory(phi3, max_model_len=4096, dtype="float32").weights == 2 * made.weights


def test_the_parts_make_the_total() -> None:
    facts = serving_memory(load_preset(PHI3), max_model_len=1000, adapters=2).as_dict()
    total = facts.pop("total")
    assert total == sum(facts.values())
    assert all(part > 0 for part in facts.values())


@pytest.mark.parametrize("more", [{"adapters": 1}, {"max_model_len": 8192}, {"dtype": "float32"}], ids=str)
def test_more_takes_more(more: dict[str, Any]) -> None:
    least = {"max_model_len": 4096}
    phi3 = load_preset(PHI3)
    assert serving_memory(phi3, **{**least, **more}).total > serving_memory(phi3, **least).total


def test_layers_divided_among_gpus_take_less_of_each_and_more_in_all() -> None:
    falcon = load_preset(FALCON)
    one, two = (serving_memory(falcon, max_model_len=2048, adapters=1, gpus=gpus) for gpus in (1, 2))
    for part in ("weights", "adapters", "cache"):
        assert getattr(one, part) / 2 < getattr(two, part) < getattr(one, part) * 0.6
    assert two.activations == one.activations


# --- plans


def test_an_a100_serves_phi3_and_the_plan_says_what_it_takes() -> None:
    plan = on_azure(config="vllm: {max-model-len: 8192}", adapters=["glosses", "verses"])
    assert (plan.instance_type, plan.gpus, plan.price_usd_hour) == (A100, 1, 3.673)
    assert (plan.max_model_len, plan.dtype) == (8192, "bfloat16")
    rows = rows_of(plan)
    assert rows["adapters"] == "glosses, verses"
    assert rows["price"] == "3.67 USD/h (eastus, 2026-06-18), for as long as it serves"
    assert rows["length"].startswith("8,192 tokens")
    assert [candidate.sku.name for candidate in plan.place.candidates][:2] == [A10, A100]
    assert "rank is not known" in plan.notes[0]


def test_who_asks_for_no_length_gets_what_the_device_holds() -> None:
    small, large = on_azure(size=A10), on_azure(size=A100)
    assert 2048 < small.max_model_len < large.max_model_len < 131_072
    assert small.max_model_len % 256 == 0
    for plan in (small, large):
        assert plan.place.usable is not None
        assert 0.85 < plan.memory.total / plan.place.usable <= 0.9
        assert any("the model reads 131,072" in note for note in plan.notes)
    assert on_azure(SMOL).max_model_len == 8192
    assert on_azure(SMOL).notes == ()


def test_the_config_for_the_pod_says_what_was_chosen() -> None:
    plan = on_azure(size=A10)
    assert InferenceConfig.resolve(plan.config_yaml).max_model_len == plan.max_model_len
    assert yaml.safe_load(plan.config_yaml)["vllm"]["dtype"] == "bfloat16"


def test_a_model_that_no_gpu_holds_is_divided_among_those_of_the_size() -> None:
    plan = on_azure(FALCON, TWO_A100)
    assert plan.gpus == 2
    assert plan.memory.total < 74 * 2**30
    assert "on each of 2 GPUs" in rows_of(plan)["memory"]
    with pytest.raises(PlanError) as caught:
        on_azure(FALCON, A100)
    assert caught.value.code == "gpu-too-small"
    assert f"{TWO_A100} (2 x A100, 80 GiB, 7.35 USD/h, divided among the GPUs)" in caught.value.hint


@pytest.mark.parametrize(
    ("preset", "size", "config", "code", "hint"),
    [
        (PHI3, A10, "vllm: {max-model-len: 131072}", "gpu-too-small", "cheapest that can"),
        (PHI3, A100, "vllm: {max-model-len: 200000}", "sequence-too-long", "write 131072 or less"),
        (PHI3, "Standard_NC4as_T4_v3", None, "no-bf16", "cheapest that can"),
        (PHI3, "m5.large", None, "unknown-instance-type", "cheapest that can"),
        (PHI3, "Standard_NC12s_v3", "vllm: {dtype: half}", "retired-instance-type", "cheapest that can"),
    ],
)
def test_a_service_that_cannot_be_had_is_refused(
    preset: str, size: str, config: str | None, code: str, hint: str
) -> None:
    with pytest.raises(PlanError) as caught:
        on_azure(preset, size, config)
    assert caught.value.code == code
    assert hint in caught.value.hint


def test_in_float16_a_t4_serves_phi3() -> None:
    plan = on_azure(PHI3, "Standard_NC4as_T4_v3", "vllm: {dtype: half}")
    assert plan.dtype == "float16"
    assert plan.place.candidates[0].sku.name == "Standard_NC4as_T4_v3"


@pytest.mark.parametrize("size", [None, "Standard_ND999_v9"])
def test_what_is_not_known_of_a_node_is_said_and_not_made_up(size: str | None) -> None:
    plan = on_azure(size=size)
    assert plan.max_model_len == 131_072
    assert plan.price_usd_hour is None
    assert rows_of(plan)["price"] == "not known"
    assert bool(plan.notes) == (size is not None)


def test_this_machine_serves_what_it_holds_and_costs_nothing(laptop: Machine) -> None:
    plan = make_serving_plan(load_preset(SMOL), workspace="w", machine=laptop)
    assert plan.instance_type is None
    assert rows_of(plan)["price"] == "nothing: this machine"
    assert rows_of(plan)["adapters"] == "none: the base model alone"
    with pytest.raises(PlanError) as caught:
        make_serving_plan(load_preset(FALCON), workspace="w", machine=laptop)
    assert (caught.value.code, caught.value.place) == ("machine-too-small", "inference.preset.name")


def test_the_plan_is_json() -> None:
    facts = on_azure(adapters=["a"]).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["memory"]["total"] == sum(v for k, v in facts["memory"].items() if k != "total")
    assert all(set(row) == {"item", "value"} and row["value"] for row in on_azure().table_rows())


WORKSPACE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: serving}
resource: {instanceType: Standard_NC24ads_A100_v4, labelSelector: {matchLabels: {a: b}}}
inference:
"""


def test_a_workspace_file_is_planned_as_it_says(tmp_path: Path) -> None:
    adapter = "{source: {name: glosses, image: r.io/glosses:1}}"
    (tmp_path / "w.yaml").write_text(f"{WORKSPACE}  preset: {{name: {PHI3}}}\n  adapters: [{adapter}]\n")
    plan = plan_serving(load_workspace(tmp_path / "w.yaml", "kubernetes"), "kubernetes")
    assert (plan.workspace, plan.instance_type, plan.adapters) == ("serving", A100, ("glosses",))
    assert plan.model == {"preset": PHI3, "id": "microsoft/Phi-3-mini-128k-instruct", "revision": "main"}


def test_a_template_and_a_tuning_workspace_have_no_such_plan(tmp_path: Path, repository_root: Path) -> None:
    (tmp_path / "w.yaml").write_text(f"{WORKSPACE}  template: {{spec: {{containers: []}}}}\n")
    for path, said in ((tmp_path / "w.yaml", "template"), (repository_root / "examples/phi-3-qlora.yaml", "nothing")):
        with pytest.raises(PlanError, match=said):
            plan_serving(load_workspace(path, "kubernetes"), "kubernetes")
