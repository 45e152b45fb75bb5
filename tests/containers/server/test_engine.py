from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kaito_flows.containers.server.engine import Engine
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.worker import Answer, Order
from kaito_flows.errors import ImageError, WeightsError

from .conftest import CONTEXT, PRESET, make_adapter, make_model, make_tokenizer

NF4 = {
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}
QUESTION = [{"role": "user", "content": "What is a test?"}]


@pytest.fixture(scope="module")
def engine(weights: Path, adapters: dict[str, Path]) -> Engine:
    engine = Engine.load(weights, name=PRESET, torch_dtype="float32")
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine


def ask(engine: Engine, model: str = PRESET, tokens: int = 24, **more: Any) -> Answer:
    options = {key: more.pop(key) for key in list(more) if key not in ("stop", "seed")}
    config = engine.configure(options, max_new_tokens=tokens)
    return engine.generate(Order(model, engine.encode_chat(QUESTION), config, **more))


def directly(model: Any, prompt: tuple[int, ...], tokens: int = 24) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=256
        )
    return tuple(output[0, len(prompt) :].tolist())


def test_base_and_adapters_answer_as_they_do_with_peft_alone(
    engine: Engine, weights: Path, adapters: dict[str, Path]
) -> None:
    prompt = engine.encode_chat(QUESTION)
    base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    expected = {PRESET: directly(base, prompt)}
    for name, folder in adapters.items():
        fresh = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
        expected[name] = directly(PeftModel.from_pretrained(fresh, folder), prompt)
    assert len(set(expected.values())) == 3
    # Twice, in another order: no adapter leaves a trace in the next answer.
    for name in (*engine.names, *reversed(engine.names)):
        assert ask(engine, name).tokens == expected[name]


def logits(engine: Engine, model: str) -> torch.Tensor:
    """What the model makes of a prompt, before a token is chosen."""
    prompt = torch.tensor([engine.encode_chat(QUESTION)])
    with torch.inference_mode(), engine._as(model):
        found: torch.Tensor = engine._base(input_ids=prompt).logits
    return found


def test_strength_scales_what_an_adapter_adds(weights: Path, adapters: dict[str, Path]) -> None:
    engine = Engine.load(weights, name=PRESET, torch_dtype="float32")
    for strength in (0.0, 0.25, 0.5, 1.0):
        engine.add_adapter(f"at-{strength}", adapters["glosses"], strength=strength)
    base = logits(engine, PRESET)
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32), adapters["glosses"]
    )
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([engine.encode_chat(QUESTION)])).logits
    assert torch.equal(logits(engine, "at-0.0"), base)
    assert torch.equal(logits(engine, "at-1.0"), expected)
    far = [float((logits(engine, f"at-{strength}") - base).norm()) for strength in (0.0, 0.25, 0.5, 1.0)]
    assert far[0] == 0 < far[1] < far[2] < far[3]
    # Half of the strength is half of the change in each weight, which merging shows: W + 0.5 x (alpha / r) x B A.
    halved = whole.merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).state_dict()
    with torch.no_grad():
        for name, tensor in halved.state_dict().items():
            tensor.copy_((tensor + plain[name]) / 2)
        merged = halved(input_ids=torch.tensor([engine.encode_chat(QUESTION)])).logits
    torch.testing.assert_close(logits(engine, "at-0.5"), merged, rtol=1e-3, atol=1e-3)


def test_combined_adapters_add_up_by_their_strengths(weights: Path, adapters: dict[str, Path]) -> None:
    engine = Engine.load(weights, name=PRESET, torch_dtype="float32")
    strengths = {"glosses": 0.6, "verses.v2": 0.4}
    for name, strength in strengths.items():
        engine.add_adapter(name, adapters[name], strength=strength)
    assert engine.default_name == "glosses"
    engine.combine("combined_adapter", list(strengths))
    assert engine.names == (PRESET, *strengths, "combined_adapter")
    assert engine.default_name == "combined_adapter"
    # PEFT's own exact sum puts the adapters' matrices side by side.
    fresh = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, adapters["glosses"], adapter_name="a")
    theirs.load_adapter(adapters["verses.v2"], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], list(strengths.values()), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([engine.encode_chat(QUESTION)])).logits
    for _ in range(2):  # and no trace of it in the others
        torch.testing.assert_close(logits(engine, "combined_adapter"), expected, rtol=1e-3, atol=1e-3)
        answers = {name: ask(engine, name).tokens for name in engine.names}
        assert len(set(answers.values())) == 4


def test_a_four_bit_base_answers_as_it_was_trained(weights: Path, adapters: dict[str, Path]) -> None:
    engine = Engine.load(weights, name=PRESET, torch_dtype="bfloat16", quantization=NF4)
    engine.add_adapter("glosses", adapters["glosses"])
    plain = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**NF4), device_map={"": "cpu"}
    )
    four_bit = [module for module in plain.modules() if type(module).__name__ == "Linear4bit"]
    assert four_bit
    for module in four_bit:
        module.support_avx512bf16_for_cpu = False
    trained = PeftModel.from_pretrained(plain, adapters["glosses"])
    assert ask(engine, "glosses").tokens == directly(trained, engine.encode_chat(QUESTION))
    assert ask(engine, "glosses").tokens != ask(engine, PRESET).tokens


def test_every_end_token_that_the_model_names_ends_the_answer(engine: Engine, weights: Path, tmp_path: Path) -> None:
    free = ask(engine)
    assert free.finish_reason == "length"
    end = free.tokens[10]
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end], "top_k": 7}))
    ending = Engine.load(folder, name=PRESET, torch_dtype="float32")
    answer = ask(ending)
    assert answer.finish_reason == "stop"
    assert answer.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert ending.end_tokens == (256, end, 260)
    assert ending.sampling_defaults == {"top_k": 7}


def test_sampling_repeats_with_a_seed_and_varies_without(engine: Engine) -> None:
    def sample(**more: Any) -> tuple[int, ...]:
        return ask(engine, do_sample=True, temperature=5.0, **more).tokens

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert len({sample() for _ in range(3)}) == 3


def test_the_coldest_sampling_is_greedy(engine: Engine) -> None:
    assert ask(engine, do_sample=True, temperature=1e-30).tokens == ask(engine).tokens


def test_an_answer_ends_at_the_next_token_when_nobody_waits(engine: Engine) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 3

    config = engine.configure({}, max_new_tokens=500)
    answer = engine.generate(Order(PRESET, (65,), config), cancelled=cancelled)
    assert (answer.finish_reason, answer.completion_tokens) == ("cancelled", 4)


def test_beam_search_answers_too(engine: Engine) -> None:
    answer = ask(engine, num_beams=3, tokens=8)
    assert answer.completion_tokens == 8
    assert answer.text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tempreature": 1.0}, "tempreature"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"penalty_alpha": 0.5}, "penalty_alpha"),
        ({"eos_token_id": 261}, "eos_token_id"),
        ({"suppress_tokens": [1, -1]}, "suppress_tokens"),
        ({"bad_words_ids": [[1], [2, 10**9]]}, "bad_words_ids"),
    ],
)
def test_an_option_that_cannot_be_had_is_refused_by_name(engine: Engine, options: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal, match=param) as caught:
        engine.configure(options, max_new_tokens=1)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_messages_that_the_template_does_not_take_are_refused(engine: Engine) -> None:
    with pytest.raises(Refusal, match="unknown role"):
        engine.encode_chat([{"role": "tool", "content": "x"}])


def test_the_context_length_is_the_models(engine: Engine) -> None:
    assert engine.context_length == CONTEXT


def test_the_context_can_be_shortened_and_not_stretched(weights: Path) -> None:
    def context(max_model_len: int) -> int:
        loaded = Engine.load(weights, name=PRESET, torch_dtype="float32", max_model_len=max_model_len)
        return loaded.context_length

    assert context(64) == 64
    assert context(2 * CONTEXT) == CONTEXT


def test_an_adapter_for_a_wider_model_is_refused_with_the_sizes(engine: Engine, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden=96).save_pretrained(tmp_path / "wide")
    adapter = make_adapter(tmp_path / "wide", tmp_path / "adapter", seed=0)
    with pytest.raises(ImageError, match=r"out_features 96, the base model 64") as caught:
        engine.add_adapter("wide", adapter)
    assert caught.value.code == "adapter-misfit"
    assert "wide" not in engine.names


def test_an_adapter_for_another_architecture_is_refused(
    weights: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters["glosses"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key.replace("qkv_proj", "q_proj"): value for key, value in load_file(file).items()}, file)
    with pytest.raises(ImageError, match="which the base model does not have") as caught:
        Engine.load(weights, name=PRESET, torch_dtype="float32").add_adapter("other", tmp_path / "adapter")
    assert caught.value.code == "adapter-misfit"


def test_an_adapter_with_half_of_its_tensors_is_refused(
    weights: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapters["glosses"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "layers.0" in key}, file)
    with pytest.raises(ImageError, match="does not hold") as caught:
        Engine.load(weights, name=PRESET, torch_dtype="float32").add_adapter("half", tmp_path / "adapter")
    assert caught.value.code == "adapter-unreadable"


def test_weights_that_are_cut_short_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError) as caught:
        Engine.load(folder, name=PRESET, torch_dtype="float32")
    assert caught.value.code == "weights-unreadable"


def test_weights_without_one_of_their_tensors_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="down_proj"):
        Engine.load(folder, name=PRESET, torch_dtype="float32")
