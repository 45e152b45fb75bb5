"""Turning a Llama model in a GGUF file into a Hugging Face folder.

Quantised tensors are de-quantised; query and key projections get back the row order of transformers, which llama.cpp's
converter changes (`LlamaModel.permute` in convert_hf_to_gguf.py); the tokenizer is built from the file's vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kaito_flows.containers.weights.bfloat16_file import Tensor, write_bfloat16
from kaito_flows.containers.weights.folder import write_json
from kaito_flows.containers.weights.tokenizer_file import ByteLevelTokenizer
from kaito_flows.errors import WeightsError

__all__ = ["write_gguf_model"]

Floats = npt.NDArray[np.float32]

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Pre-tokenizers that llama.cpp names, and whether each splits every digit (llama-vocab.cpp).
PRE_TOKENIZERS = {"smollm": True, "gpt-2": False}
# llama.cpp's token types: 3 is "control".
CONTROL = 3


def write_gguf_model(path: Path, folder: Path, *, tensors: bool = True) -> None:
    """Write the model in the GGUF file `path` into `folder`: configuration, tokenizer and, if asked, bfloat16 weights.

    Raises:
        WeightsError: (code `weights-unreadable`) not a GGUF file; (code `weights-unsupported`) another architecture
            or another kind of tokenizer.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as exc:
        raise WeightsError(f"not a GGUF file: {exc}", place=path.name, code="weights-unreadable") from exc
    facts = _Facts(reader, path.name)
    if facts["general.architecture"] != "llama":
        raise facts.unsupported(f"architecture {facts['general.architecture']!r}; only 'llama' can be converted")
    tokenizer = _tokenizer(facts)
    config = _config(facts, tokenizer)
    found = [_tensor(raw, config, facts) for raw in reader.tensors]
    tied = all(tensor.name != "lm_head.weight" for tensor in found)
    expected = 9 * config["num_hidden_layers"] + (2 if tied else 3)
    if len({tensor.name for tensor in found}) != expected:
        raise facts.unsupported(f"{len(found)} tensors, where a Llama of this shape has {expected}")
    write_json(folder / "config.json", {**config, "tie_word_embeddings": tied})
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", ids)
    tokenizer.write(folder)
    if tensors:
        write_bfloat16(folder / "model.safetensors", found)


class _Facts:
    """The file's metadata, by key."""

    def __init__(self, reader: Any, place: str) -> None:
        self._fields = reader.fields
        self._place = place

    def __getitem__(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except KeyError as exc:
            raise self.unsupported(f"no {key!r} in its metadata") from exc

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def unsupported(self, message: str) -> WeightsError:
        return WeightsError(message, place=self._place, code="weights-unsupported")


def _tokenizer(facts: _Facts) -> ByteLevelTokenizer:
    if facts["tokenizer.ggml.model"] != "gpt2" or facts["tokenizer.ggml.pre"] not in PRE_TOKENIZERS:
        kind = f"{facts['tokenizer.ggml.model']!r} with {facts['tokenizer.ggml.pre']!r}"
        raise facts.unsupported(f"tokenizer {kind}; known are byte-level ones with {', '.join(PRE_TOKENIZERS)}")
    tokens = facts["tokenizer.ggml.tokens"]
    special = [t for t, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    bos, eos = tokens[facts["tokenizer.ggml.bos_token_id"]], tokens[facts["tokenizer.ggml.eos_token_id"]]
    pad = tokens[facts.get("tokenizer.ggml.padding_token_id", facts["tokenizer.ggml.eos_token_id"])]
    # Padding with the end token is the old fault that teaches a model never to stop; take another where there is one.
    if pad == eos:
        pad = next((token for token in special if token == "<|endoftext|>"), eos)
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    return ByteLevelTokenizer(
        tokens=tokens,
        merges=merges,
        special=special,
        bos=bos,
        eos=eos,
        pad=pad,
        unknown=tokens[facts.get("tokenizer.ggml.unknown_token_id", 0)],
        chat_template=facts.get("tokenizer.chat_template", ""),
        context_length=facts["llama.context_length"],
        single_digits=PRE_TOKENIZERS[facts["tokenizer.ggml.pre"]],
    )


def _config(facts: _Facts, tokenizer: ByteLevelTokenizer) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(tokenizer.tokens),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        # Through the shortest float32 spelling: the file holds 1e-05 as 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(facts["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(facts["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": facts["llama.embedding_length"] ** -0.5,
        "bos_token_id": tokenizer.token_id(tokenizer.bos),
        "eos_token_id": tokenizer.token_id(tokenizer.eos),
        "pad_token_id": tokenizer.token_id(tokenizer.pad),
        "use_cache": True,
    }


def _tensor(raw: Any, config: dict[str, Any], facts: _Facts) -> Tensor:
    from gguf.quants import dequantize

    # A GGUF shape counts from the fastest axis; numpy's from the slowest.
    shape = tuple(int(size) for size in reversed(raw.shape))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    match = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)\.weight", raw.name)
    if raw.name in OUTER:
        name, rotated = OUTER[raw.name], 0
    elif match and match[2] in BLOCK:
        name, rotated = f"model.layers.{match[1]}.{BLOCK[match[2]]}.weight", heads.get(match[2], 0)
    else:
        raise facts.unsupported(f"tensor {raw.name!r}, which a Llama does not have")

    def values() -> Floats:
        plain: Floats = dequantize(raw.data, raw.tensor_type).astype(np.float32, copy=False).reshape(shape)
        return unpermute(plain, rotated) if rotated else plain

    return Tensor(name, shape, values)


def unpermute(weight: Floats, heads: int) -> Floats:
    """Return a query or key projection `[heads x head_dim, hidden]` with transformers' order of rows in each head.

    llama.cpp's rotary embedding turns neighbouring rows, transformers' turns rows that lie half a head apart.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
