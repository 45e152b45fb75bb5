"""GGUF files, small ones made here: right ones come out right, wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kaito_flows.containers.weights.gguf_model import write_gguf_model
from kaito_flows.errors import WeightsError

WriteGguf = Callable[..., dict[str, Any]]


def test_each_tensor_has_its_transformers_name_and_order(tmp_path: Path, write_gguf: WriteGguf) -> None:
    from safetensors.torch import load_file

    plain = write_gguf(tmp_path / "m.gguf")
    write_gguf_model(tmp_path / "m.gguf", tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    assert len(got) == len(plain)
    expected = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    }
    import torch

    for before, after in expected.items():
        # torch's own rounding to bfloat16 is the measure of ours
        assert torch.equal(got[after], torch.from_numpy(plain[before]).to(torch.bfloat16)), after


def test_transformers_reads_the_same_model_from_the_folder_as_from_the_gguf(
    tmp_path: Path, write_gguf: WriteGguf
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf_model(tmp_path / "m.gguf", folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in theirs.state_dict().items()})
    ids = torch.arange(3, 19).reshape(1, 16)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_pad_token_that_is_the_end_token_is_replaced(tmp_path: Path, write_gguf: WriteGguf) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_gguf_model(tmp_path / "m.gguf", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        ({"pre": "qwen2"}, "tokenizer 'gpt2' with 'qwen2'"),
        ({"drop": "blk.1.ffn_up.weight"}, "19 tensors, where a Llama of this shape has 20"),
        ({"extra": "blk.0.attn_q.bias"}, "'blk.0.attn_q.bias'"),
        ({"extra": "rope_freqs.weight"}, "'rope_freqs.weight'"),
    ],
)
def test_what_is_no_plain_llama_is_refused(
    tmp_path: Path, write_gguf: WriteGguf, wrong: dict[str, str], said: str
) -> None:
    write_gguf(tmp_path / "m.gguf", **wrong)
    with pytest.raises(WeightsError) as caught:
        write_gguf_model(tmp_path / "m.gguf", tmp_path)
    assert caught.value.code == "weights-unsupported"
    assert said in caught.value.message


@pytest.mark.parametrize("kept", [0, 3, 40, 2000, -100])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, write_gguf: WriteGguf, kept: int) -> None:
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:kept])
    with pytest.raises(WeightsError) as caught:
        write_gguf_model(tmp_path / "m.gguf", tmp_path)
    assert caught.value.code == "weights-unreadable"
    assert not (tmp_path / "model.safetensors").exists()


def test_something_else_than_a_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(WeightsError, match="not a GGUF file") as caught:
        write_gguf_model(tmp_path / "m.gguf", tmp_path)
    assert caught.value.place == "m.gguf"


def test_rounding_to_bfloat16_is_torchs() -> None:
    import torch

    from kaito_flows.containers.weights.bfloat16_file import to_bfloat16

    # Random bits reach every exponent, denormals too; ties to even are 0x8000 below a kept half.
    bits = np.random.RandomState(0).randint(0, 2**32, 200_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), theirs)


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    from kaito_flows.containers.weights.bfloat16_file import Tensor, write_bfloat16

    broken = np.array([1.0, np.nan], dtype=np.float32)
    with pytest.raises(WeightsError, match="not finite"):
        write_bfloat16(tmp_path / "x.safetensors", [Tensor("w", (2,), lambda: broken)])
