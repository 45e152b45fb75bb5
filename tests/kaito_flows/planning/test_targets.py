"""Target modules: what users and KAITO's examples write, for what the model has."""

from __future__ import annotations

import pytest

from kaito_flows.errors import ConfigError
from kaito_flows.planning.targets import resolve_targets
from kaito_flows.presets.loader import load_preset

PHI3, SMOL, FALCON = (load_preset(n) for n in ("phi-3-mini-4k-instruct", "smollm2-135m-instruct", "falcon-7b"))


@pytest.mark.parametrize("asked", ["all-linear", ["all-linear"], ["all-linear", "o_proj"]])
def test_all_linear_means_every_linear_layer(asked: str | list[str]) -> None:
    assert resolve_targets(PHI3, asked) == (PHI3.linear_modules, ())
    assert resolve_targets(SMOL, asked) == (SMOL.linear_modules, ())


def test_kaitos_list_for_phi3_reaches_the_fused_modules() -> None:
    asked = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    names, notes = resolve_targets(PHI3, asked)
    assert names == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert any("k_proj, q_proj, v_proj fused in qkv_proj" in note for note in notes)
    assert any("gate_proj, up_proj fused in gate_up_proj" in note for note in notes)


def test_the_same_modules_in_another_order_are_the_same() -> None:
    assert resolve_targets(SMOL, ["v_proj", "q_proj", "v_proj"]) == (("q_proj", "v_proj"), ())
    assert resolve_targets(SMOL, ["self_attn.q_proj", "v_proj"])[0] == ("q_proj", "v_proj")


def test_falcons_attention_is_one_module() -> None:
    assert resolve_targets(FALCON, ["q_proj", "dense"])[0] == ("query_key_value", "dense")


@pytest.mark.parametrize("asked", [["q_prj"], ["o_proj", "lm_head"], ["qkv_proj"], ["Q_PROJ"], [""], "embed_tokens"])
def test_a_module_that_is_not_there_is_named_with_those_that_are(asked: list[str] | str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(SMOL, asked)
    assert caught.value.code == "unknown-target-module"
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in caught.value.hint


def test_no_module_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no module"):
        resolve_targets(SMOL, [])
