"""Answers of the base model and of the adapter to the same prompts, held-out ones where there are any, for the report.

They are told as an event and are not in the image: an adapter may go where the data may not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kaito_flows.containers.tuner.model import Adapted

__all__ = ["SAMPLE_TOKENS", "compare"]

SAMPLE_TOKENS = 48
"""How long an answer may get: each token of both answers takes time on the GPU."""

LONGEST_PROMPT = 1024
_Tokenizer: Any = AutoTokenizer


def compare(adapted: Adapted, weights: Path, data: Path) -> list[dict[str, Any]]:
    """Answer the dataset's samples greedily, with and without the adapter.

    Returns:
        for each sample its `messages`, the answer that the data `expected`, and those of `base` and `tuned`.
    """
    file = data / "samples.json"
    if not file.is_file():
        return []
    samples: list[dict[str, Any]] = json.loads(file.read_bytes())
    tokenizer = _Tokenizer.from_pretrained(weights, local_files_only=True, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template(sample["messages"], add_generation_prompt=True, tokenize=False)
        for sample in samples
    ]
    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    kept = [number for number, ids in enumerate(encoded) if len(ids) <= LONGEST_PROMPT]
    if not kept:
        return []
    batch = tokenizer.pad({"input_ids": [encoded[number] for number in kept]}, return_tensors="pt")
    adapted.peft.eval()
    try:
        tuned = _generate(adapted, tokenizer, batch)
        with adapted.peft.disable_adapter():
            base = _generate(adapted, tokenizer, batch)
    finally:
        adapted.peft.train()
    return [
        {
            "messages": samples[number]["messages"],
            "expected": samples[number]["answer"],
            "base": before,
            "tuned": after,
        }
        for number, before, after in zip(kept, base, tuned, strict=True)
    ]


@torch.no_grad()
def _generate(adapted: Adapted, tokenizer: Any, batch: Any) -> list[str]:
    ids, mask = batch["input_ids"].to(adapted.device), batch["attention_mask"].to(adapted.device)
    dtype = adapted.model.get_input_embeddings().weight.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(adapted.device.type, dtype, enabled=half):
        output = adapted.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.pad_token_id, temperature=None, top_p=None, top_k=None,
            synced_gpus=adapted.sharded,
        )  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts
