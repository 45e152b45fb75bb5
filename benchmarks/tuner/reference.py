"""`python -m benchmarks.tuner.reference TRIAL.json`: the plainest loop that trains the same, to hold ours against.

One chat at a time, alone in its row, all logits in float32, PyTorch's own AdamW and clipping, nothing of our tuner's
code. It reads the dataset that ours trained on, for the order of the rows; their documents it takes apart by itself.

At the end the adapter that ours made is put into both: each chat's loss as our tuner computes it, packed beside others,
is held against that of the chat alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.tuner.material import LINEAR
from benchmarks.tuner.trial import SEED, Trial
from kaito_flows.containers.program import emit, run
from kaito_flows.containers.tuner import data, loss, model
from kaito_flows.containers.tuner.job import read_config

SAMPLED_ROWS = 16


def main(trial: Trial) -> dict[str, Any]:
    """Train, tell the loss of each step; then return how far a packed chat's loss is from its own, at most."""
    root = trial.folder / "root"
    tensors = load_file(root / "mnt/data/train.safetensors")
    rows = [list(_documents(*row)) for row in zip(*(tensors[name] for name in data.NAMES), strict=True)]
    network = _network(trial)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=0.0)
    rows_a_step = trial.rows * trial.micro_steps
    starts = range(0, len(rows), rows_a_step)
    network.train()
    tokens = 0
    for step in range(trial.steps):
        start = starts[step % len(starts)]
        documents = [document for row in rows[start : start + rows_a_step] for document in row]
        targets = sum(int(mask[1:].sum()) for _, mask in documents)
        summed = 0.0
        for ids, mask in documents:
            lost = _loss(network, ids, mask) / targets
            lost.backward()
            summed += float(lost.detach())
            tokens += len(ids)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        emit("progress", step=step + 1, loss=summed, tokens=tokens)
    return {"furthest": _furthest(trial, network, root)}


def _documents(ids: Any, mask: Any, positions: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a row's documents that hold something to learn, as ids and mask."""
    starts = (positions == 0).nonzero()[:, 0].tolist()
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        if bool(mask[start + 1 : end].any()):
            yield ids[start:end].long(), mask[start:end] != 0


def _network(trial: Trial) -> Any:
    dtype = getattr(torch, trial.dtype)
    base = AutoModelForCausalLM.from_pretrained(
        trial.weights,
        dtype=dtype,
        attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        ),
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
    )
    torch.manual_seed(SEED)
    return get_peft_model(base, LoraConfig(r=trial.r, lora_alpha=trial.r, lora_dropout=0.0, target_modules=LINEAR))


def _loss(network: Any, ids: Any, mask: Any) -> Any:
    """The summed loss of one chat that is alone."""
    ids, mask = ids.to(network.device), mask.to(network.device)
    logits = network(input_ids=ids[None], use_cache=False).logits[0].float()
    return functional.cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum")


@torch.no_grad()
def _furthest(trial: Trial, network: Any, root: Path) -> float:
    config = read_config(root / "mnt/config/training_config.yaml", "qlora")
    adapted = model.adapt(model.load_base(trial.weights, config), "benchmarks/random-phi-3", config)
    trained = load_file(root / "mnt/results/adapter_model.safetensors")
    for peft_model in (adapted.peft, network):
        set_peft_model_state_dict(peft_model, trained)
    split = data.load_dataset(root / "mnt/data").train
    worst = 0.0
    for first in range(0, min(SAMPLED_ROWS, len(split)), trial.rows):
        rows = torch.arange(first, min(first + trial.rows, len(split)))
        batch = split.batch(rows, adapted.device, flat=adapted.flat)
        document = (batch.position_ids == 0).flatten().cumsum(0)
        for number in document[batch.sources].unique().tolist():
            own = document[batch.sources] == number
            packed = loss.loss_sum(
                adapted.model,
                replace(batch, sources=batch.sources[own], labels=batch.labels[own]),
                masked=adapted.masked,
            )
            ids = batch.input_ids.flatten()[document == number]
            mask = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            mask[batch.sources[own] + 1 - int((document == number).nonzero()[0])] = True
            worst = max(worst, abs(float(packed - _loss(network, ids, mask))) / int(own.sum()))
    return worst


if __name__ == "__main__":
    run(main, Trial, sys.argv)
