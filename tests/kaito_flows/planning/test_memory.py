"""The memory estimate, against published and measured figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kaito_flows.containers.tuner.loss import chunk_of
from kaito_flows.errors import PlanError
from kaito_flows.planning.memory import (
    RUNTIME_BYTES,
    MemoryEstimate,
    measured_share,
    memory_key,
    sharded_memory,
    tokens_with_logits,
    tuning_memory,
)
from kaito_flows.planning.shapes import lora_parameters
from kaito_flows.presets.loader import load_preset, load_presets

Config = Callable[..., dict[str, Any]]
PHI3 = "phi-3-mini-4k-instruct"


def estimate(config: Config, preset: str = PHI3, method: str = "qlora", **changes: Any) -> MemoryEstimate:
    return tuning_memory(load_preset(preset), config(preset, method, **changes), method)


def test_phi3_in_nf4_takes_what_was_derived_for_it(config: Config) -> None:
    made = estimate(config)
    assert made.weights / 1e9 == pytest.approx(1.87 + 0.39, abs=0.01)
    assert made.adapter / 1e9 == pytest.approx(0.40, abs=0.005)
    assert made.adapter_parameters == 25_165_824


def test_a_token_without_recompute_takes_four_megabytes(config: Config) -> None:
    made = estimate(config, gradient_checkpointing=False, max_length=1000)
    assert made.activations / 1000 / 1e6 == pytest.approx(4.66, abs=0.01)


def test_no_more_logits_are_counted_than_the_tuner_makes_at_once(config: Config) -> None:
    # In bfloat16 and in float32, with gradients in both: 12 bytes for each of 32 064 words.
    assert estimate(config, max_length=100).logits / 100 == 12 * 32_064
    assert estimate(config, max_length=1000).logits == estimate(config, max_length=8000).logits == 523 * 12 * 32_064
    for vocabulary in (500, 32_064, 32_768, 128_256, 256_000):
        assert tokens_with_logits(vocabulary) == chunk_of(vocabulary) >= 512


def test_a_token_with_recompute_keeps_the_boundaries_and_one_block(config: Config) -> None:
    made = estimate(config, max_length=1000)
    assert made.activations / 1000 / 1e6 == pytest.approx(0.197 + 4.657 / 32, abs=0.001)


def test_lora_keeps_the_whole_model_in_bfloat16(config: Config) -> None:
    assert estimate(config, method="lora").weights == 2 * 3_821_079_552


def test_single_quantisation_takes_more_than_double(config: Config) -> None:
    more = estimate(config, bnb_4bit_use_double_quant=False).weights - estimate(config).weights
    # QLoRA's paper, section 3: double quantisation saves 0.373 bits a parameter
    assert more * 8 / 3_623_878_656 == pytest.approx(0.373, abs=0.001)


KINDS = {"mistral": "mistral-7b", "phi3": PHI3, "qwen2": "qwen2.5-coder-7b-instruct"}


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_what_autograd_keeps_of_it(kind: str, dropout: float, config: Config) -> None:
    """What PyTorch saves for the backward pass of a block in bfloat16, against the formula for such a shape."""
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens, preset = 512, load_preset(KINDS[kind])
    resolved = config(KINDS[kind], "lora", lora_dropout=dropout, max_length=tokens, gradient_checkpointing=False)

    def saved(blocks: int) -> int:
        settings = transformers.AutoConfig.for_model(
            kind, vocab_size=64, num_hidden_layers=blocks, pad_token_id=0, bos_token_id=0, eos_token_id=0, **shape
        )
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        lora = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules=resolved["LoraConfig"]["target_modules"])
        body = peft.get_peft_model(model, lora).get_base_model().model
        held = {p.untyped_storage().data_ptr() for p in body.parameters()}
        seen: dict[int, tuple[int, Any]] = {}

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            body(input_ids=torch.zeros((1, tokens), dtype=torch.int64), use_cache=False)
        return sum(size for size, _ in seen.values())

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 1}
    small = preset.model_copy(update={"architecture": preset.architecture.model_copy(update=sizes)})
    counted = tuning_memory(small, resolved, "lora")
    assert saved(3) - saved(2) == pytest.approx(counted.activations, rel=0.05)


def test_a_block_that_keeps_its_activations_takes_what_it_saves(config: Config) -> None:
    made, without = estimate(config), estimate(config, gradient_checkpointing=False)
    kept_all = made.total + 32 * made.kept_block
    assert kept_all == pytest.approx(without.total, rel=0.03)
    assert kept_all >= without.total
    assert without.kept_block == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 64},
        {"max_length": 2048},
        {"per_device_train_batch_size": 2},
        {"gradient_checkpointing": False},
        {"attn_implementation": "eager"},
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"torch_dtype": "float32"},
    ],
    ids=str,
)
def test_more_work_takes_more_memory(config: Config, changes: dict[str, Any]) -> None:
    assert estimate(config, **changes).total > estimate(config).total


def test_divided_among_gpus_each_holds_its_part_and_what_is_gathered(config: Config) -> None:
    preset, resolved = load_preset(PHI3), config(PHI3, "lora")
    whole = tuning_memory(preset, resolved, "lora")
    eight = sharded_memory(preset, resolved, whole, 8)
    gathered = 2 * (preset.parameters.total - preset.parameters.linear) + 2 * 2 * preset.parameters.linear / 32
    assert eight.weights == pytest.approx(whole.weights / 8 + gathered, abs=10)
    assert (eight.adapter, eight.activations) == (whole.adapter, whole.activations)
    assert eight.logits == whole.logits
    shared = load_preset("falcon-40b")
    resolved = config("falcon-40b", "lora")
    whole = tuning_memory(shared, resolved, "lora")
    tokens = resolved["TrainingArguments"]["max_length"]
    assert sharded_memory(shared, resolved, whole, 8).logits == 12 * 65_024 * tokens > whole.logits, "all at once"


def test_fewer_targets_take_less(config: Config) -> None:
    assert estimate(config, target_modules=["qkv_proj"]).adapter < estimate(config).adapter / 2


def test_smollm2_has_as_many_adapter_parameters_as_peft_counts() -> None:
    smol = load_preset("smollm2-135m-instruct")
    # An adapter of 19.6 MB in float32 was measured.
    assert lora_parameters(smol.architecture, smol.linear_modules, 16) * 4 / 1e6 == pytest.approx(19.5, abs=0.1)


def test_peft_counts_the_same_on_a_real_phi3() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tiny = load_preset("tiny-phi-3")
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**tiny.source.config, pad_token_id=0))  # type: ignore[union-attr]
    assert sum(p.numel() for p in model.parameters()) == tiny.parameters.total
    for dora in (False, True):
        lora = peft.LoraConfig(r=8, target_modules=list(tiny.linear_modules), use_dora=dora)
        adapted = peft.get_peft_model(model, lora)
        counted = adapted.get_nb_trainable_parameters()[0]
        assert counted == lora_parameters(tiny.architecture, tiny.linear_modules, 8, dora=dora)
        model = adapted.unload()


def test_the_parts_make_the_total(config: Config) -> None:
    for preset in load_presets():
        facts = estimate(config, preset.name, max_length=512).as_dict()
        total = facts.pop("total")
        assert total == sum(facts.values())
        assert all(part > 0 for part in facts.values()), preset.name


def test_a_module_without_a_known_shape_is_refused(config: Config) -> None:
    with pytest.raises(PlanError, match="'lm_head'"):
        estimate(config, target_modules=["qkv_proj", "lm_head"])


def test_a_measurement_scales_every_part(config: Config) -> None:
    formulas = estimate(config)
    scaled = formulas.scaled(0.8)
    assert scaled.total == pytest.approx(0.8 * formulas.total, abs=5)
    assert scaled.kept_block == int(0.8 * formulas.kept_block)
    assert sum(scaled.as_dict()[part] for part in ("weights", "adapter", "activations", "logits", "overhead")) == (
        scaled.total
    )


@pytest.mark.parametrize("planned_with", [1.0, 0.7])
def test_what_was_measured_is_a_share_of_the_formulas_whatever_it_was_planned_with(
    planned_with: float, config: Config
) -> None:
    formulas = estimate(config)
    planned = formulas.scaled(planned_with)
    assert measured_share(planned, host_bytes=int(1.3 * formulas.total)) == pytest.approx(1.3, rel=1e-3)
    tensors = 10 * 10**9
    with_blocks = measured_share(planned, host_bytes=1, gpu_bytes=tensors, kept_blocks=20)
    comes_and_goes = tensors - formulas.weights - formulas.adapter
    expected = (tensors + 0.1 * comes_and_goes + RUNTIME_BYTES) / (formulas.total + 20 * formulas.kept_block)
    assert with_blocks == pytest.approx(expected, rel=1e-3)


def test_a_training_that_takes_what_the_formulas_say_says_nothing_new(config: Config) -> None:
    """Else its own GPU would be too small for the next one."""
    for method in ("lora", "qlora"):
        for length in (512, 4096):
            formulas = estimate(config, method=method, max_length=length)
            tensors = formulas.weights + formulas.adapter + formulas.activations + formulas.logits
            share = measured_share(formulas, host_bytes=1, gpu_bytes=tensors)
            assert share is not None
            assert 0.9 < share < 1.000001


def test_a_model_in_float32_keeps_its_blocks_inputs_in_float32(config: Config) -> None:
    short, long = (estimate(config, torch_dtype="float32", max_length=length) for length in (1000, 2000))
    a_token = (long.activations - short.activations) / 1000
    block = estimate(config, torch_dtype="float32", max_length=1000, gradient_checkpointing=False).activations / 32_000
    assert a_token == pytest.approx(32 * 4 * 3072 + block, rel=1e-3)


def test_a_measurement_of_something_else_is_not_believed(config: Config) -> None:
    assert measured_share(estimate(config), host_bytes=10**6) is None
    assert measured_share(estimate(config), host_bytes=10**12) is None


def test_trainings_that_take_as_much_have_one_name(config: Config) -> None:
    def key(device: str = "gpu", preset: str = PHI3, method: str = "qlora", **changes: Any) -> str:
        return memory_key(load_preset(preset), config(preset, method, **changes), method, device)

    same = {key(), key(learning_rate=1.0), key(max_steps=7), key(gradient_accumulation_steps=8), key(seed=5)}
    assert len(same) == 1
    others = [key("cpu"), key(r=8), key(max_length=512), key(method="lora"), key(gradient_checkpointing=False),
              key(lora_dropout=0.1), key(preset="phi-3-mini-128k-instruct"), key(packing=False)]  # fmt: skip
    assert len({*others, *same}) == len(others) + 1
