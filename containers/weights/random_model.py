"""A Phi-3 with weights drawn from a seed, and its tokenizer: nothing is downloaded.

It has Phi-3's fused projections, special tokens and chat template, and knows nothing: it is there to try the whole way
through in seconds, not to talk to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from tokenizers.pre_tokenizers import ByteLevel

from kaito_flows.containers.program import strict
from kaito_flows.containers.weights.bfloat16_file import Tensor, write_bfloat16
from kaito_flows.containers.weights.folder import write_json
from kaito_flows.containers.weights.job import RandomSource
from kaito_flows.containers.weights.tokenizer_file import ByteLevelTokenizer
from kaito_flows.errors import WeightsError

__all__ = ["write_random_model"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """How to make the tokenizer: the 256 bytes, the first `merges` English merges, then the special tokens."""

    merges: int
    special: list[str]
    bos: str
    eos: str
    pad: str
    end_of_turn: str
    chat_template: str


def write_random_model(source: RandomSource, folder: Path, *, tensors: bool = True) -> None:
    """Write configuration, tokenizer and, if asked, bfloat16 weights; the same source gives the same bytes.

    Raises:
        WeightsError: (code `weights-unsupported`) not a Phi-3; or a configuration that does not fit the tokenizer.
    """
    recipe = strict(TokenizerRecipe, source.tokenizer, place="source.tokenizer")
    tokenizer = _tokenizer(recipe, source.config)
    config = _config(source.config, tokenizer)
    write_json(folder / "config.json", config)
    end = [tokenizer.token_id(tokenizer.eos), tokenizer.token_id(recipe.end_of_turn)]
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**generation, "eos_token_id": sorted(set(end))})
    tokenizer.write(folder)
    if tensors:
        write_bfloat16(folder / "model.safetensors", _tensors(config, source.seed))


def _tokenizer(recipe: TokenizerRecipe, config: dict[str, Any]) -> ByteLevelTokenizer:
    text = files(__package__).joinpath("english_merges.yaml").read_text(encoding="utf-8")
    known: list[str] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["merges"]
    if not 0 <= recipe.merges <= len(known):
        raise WeightsError(f"there are {len(known)} merges, not {recipe.merges}", place="source.tokenizer.merges")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in known[: recipe.merges])]
    for key in ("bos", "eos", "pad", "end_of_turn"):
        if getattr(recipe, key) not in recipe.special:
            raise WeightsError(f"{getattr(recipe, key)!r} is no special token", place=f"source.tokenizer.{key}")
    return ByteLevelTokenizer(
        tokens=[*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges), *recipe.special],
        merges=merges,
        special=recipe.special,
        bos=recipe.bos,
        eos=recipe.eos,
        pad=recipe.pad,
        unknown=recipe.pad,
        chat_template=recipe.chat_template,
        context_length=int(config.get("max_position_embeddings", 2048)),
    )


def _config(given: dict[str, Any], tokenizer: ByteLevelTokenizer) -> dict[str, Any]:
    if given.get("model_type") != "phi3":
        message = f"model type {given.get('model_type')!r}; only 'phi3' can be made"
        raise WeightsError(message, place="source.config.model_type", code="weights-unsupported")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if not isinstance(given.get(key), int) or given[key] < 1:
            raise WeightsError(f"{given.get(key)!r} is not a positive number", place=f"source.config.{key}")
    hidden, heads, groups = (given[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or heads % groups or hidden // heads % 2:
        message = f"{heads} heads with {groups} for keys do not divide {hidden}"
        raise WeightsError(message, place="source.config.num_attention_heads")
    if given.get("vocab_size") != len(tokenizer.tokens):
        message = f"{given.get('vocab_size')}, but the tokenizer has {len(tokenizer.tokens)} tokens"
        raise WeightsError(message, place="source.config.vocab_size")
    ids = {f"{name}_token_id": tokenizer.token_id(getattr(tokenizer, name)) for name in ("bos", "eos", "pad")}
    return {"architectures": ["Phi3ForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": False, **given, **ids}


def _tensors(config: dict[str, Any], seed: int) -> list[Tensor]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    norm = (hidden,)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": norm}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": norm,
            f"{block}.self_attn.qkv_proj.weight": (hidden + 2 * kv, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.post_attention_layernorm.weight": norm,
            f"{block}.mlp.gate_up_proj.weight": (2 * inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
        }
    deviation = float(config.get("initializer_range", 0.02))
    # RandomState's stream is frozen by numpy's policy (NEP 19); a Generator's may change between releases.
    return [
        Tensor(name, shape, partial(_ones, shape) if shape == norm else partial(_normal, [seed, i], shape, deviation))
        for i, (name, shape) in enumerate(sorted(shapes.items()))
    ]


def _ones(shape: tuple[int, ...]) -> Floats:
    return np.ones(shape, dtype=np.float32)


def _normal(seed: list[int], shape: tuple[int, ...], deviation: float) -> Floats:
    return (np.random.RandomState(seed).standard_normal(shape) * deviation).astype(np.float32)
