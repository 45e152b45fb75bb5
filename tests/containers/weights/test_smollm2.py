"""The preset that has a real model in a package: is what comes out of it the model that went in?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    yield model


def ask(model: Any, tokenizer: Any, question: str, tokens: int) -> str:
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0][inputs["input_ids"].shape[1] :]))


def test_it_knows_the_capital_of_france_and_stops(model: Any, tokenizer: Any) -> None:
    assert ask(model, tokenizer, "What is the capital of France?", 20) == "The capital of France is Paris.<|im_end|>"


def test_every_parameter_is_there_once_in_bfloat16(smollm2: Path) -> None:
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names
    assert json.loads((smollm2 / "config.json").read_text())["tie_word_embeddings"] is True
    # 134,515,008 parameters as counted for the preset; 2 bytes each and a header of some kilobytes
    assert 0 < (smollm2 / "model.safetensors").stat().st_size - 2 * 134_515_008 < 100_000


def test_every_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox can't jump 10,000 times.",
        "  two spaces\n\n\n\tand a tab ",
        "Été à Paris, 日本語, 🙂 zero\u200bwidth",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
)
def test_text_comes_back_as_it_went_in(smollm2: Path, tokenizer: Any, text: str) -> None:
    bare = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = bare.encode(text).ids
    assert bare.decode(ids, skip_special_tokens=False) == text
    assert tokenizer(text)["input_ids"] == ids


def test_a_chat_is_written_as_smollm2_learnt_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        system + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )


def test_padding_is_not_the_end_of_a_turn(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
