"""The model made on the spot: Phi-3's architecture for real, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.weights.job import RandomSource, read_source
from kaito_flows.containers.weights.random_model import write_random_model
from kaito_flows.errors import KaitoFlowsError, WeightsError

SourceOf = Callable[[str], dict[str, Any]]


@pytest.fixture
def source(source_of: SourceOf) -> RandomSource:
    read = read_source(source_of("tiny-phi-3"))
    assert isinstance(read, RandomSource)
    return read


def test_transformers_loads_a_phi3_with_fused_projections(tiny_phi3: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(tiny_phi3, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == "Phi3ForCausalLM"
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    assert model.lm_head.weight.std().item() == pytest.approx(0.08, rel=0.02)


def test_a_chat_ends_as_phi3_chats_end(tiny_phi3: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_phi3)
    chat = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant")]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|system|>\nHi<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHi<|end|>\n<|endoftext|>"
    )
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert GenerationConfig.from_pretrained(tiny_phi3).eos_token_id == ends


def test_any_text_can_be_written(tiny_phi3: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_phi3 / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    text = "The people understand. Été 日本 🙂\n\tEND 42"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    # English is written in words and syllables, not in letters
    assert len(tokenizer.encode("The people of the world are here for you").ids) <= 12


def test_the_same_seed_gives_the_same_bytes(tiny_phi3: Path, tmp_path: Path, source: RandomSource) -> None:
    write_random_model(source, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tiny_phi3 / path.name).read_bytes(), path.name


def test_another_seed_gives_another_model(tiny_phi3: Path, tmp_path: Path, source: RandomSource) -> None:
    write_random_model(RandomSource(1, source.config, source.tokenizer), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (tiny_phi3 / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny_phi3 / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("config", "tokenizer", "place"),
    [
        ({"model_type": "llama"}, {}, "source.config.model_type"),
        ({"vocab_size": 2048}, {}, "source.config.vocab_size"),
        ({"hidden_size": 0}, {}, "source.config.hidden_size"),
        ({"hidden_size": "128"}, {}, "source.config.hidden_size"),
        ({"num_key_value_heads": 3}, {}, "source.config.num_attention_heads"),
        ({}, {"merges": 5000}, "source.tokenizer.merges"),
        ({}, {"pad": "<pad>"}, "source.tokenizer.pad"),
        ({}, {"colour": "blue"}, "source.tokenizer"),
    ],
)
def test_a_model_that_does_not_fit_together_is_refused(
    tmp_path: Path, source: RandomSource, config: dict[str, Any], tokenizer: dict[str, Any], place: str
) -> None:
    wrong = RandomSource(0, {**source.config, **config}, {**source.tokenizer, **tokenizer})
    with pytest.raises(KaitoFlowsError) as caught:
        write_random_model(wrong, tmp_path)
    assert caught.value.place == place
    assert list(tmp_path.iterdir()) == []


def test_a_config_key_that_is_missing_is_named(tmp_path: Path, source: RandomSource) -> None:
    config = {key: value for key, value in source.config.items() if key != "num_hidden_layers"}
    with pytest.raises(WeightsError, match="None is not a positive number") as caught:
        write_random_model(RandomSource(0, config, source.tokenizer), tmp_path)
    assert caught.value.place == "source.config.num_hidden_layers"


def test_the_config_says_what_the_preset_says(tiny_phi3: Path) -> None:
    from kaito_flows.presets.loader import load_preset

    config, shape = json.loads((tiny_phi3 / "config.json").read_text()), load_preset("tiny-phi-3").architecture
    assert config["architectures"] == [shape.name]
    assert config["hidden_size"] == shape.hidden_size
    assert config["intermediate_size"] == shape.intermediate_size
    assert config["num_hidden_layers"] == shape.layers
    assert config["vocab_size"] == shape.vocab_size
    assert config["max_position_embeddings"] == shape.context_length
