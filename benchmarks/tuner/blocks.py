"""What a pass forwards and backwards through a model's blocks takes: how documents lie, and how many compute again.

    python -m benchmarks.tuner.blocks                 # 12 minutes on a CPU

Eight blocks of SmolLM2's shape in bfloat16, an adapter on all linear layers, 8192 tokens of documents whose lengths are
those of the contest's chats. First in rows that are laid out anew, which a model keeps apart by a mask, against one row
in which our attention goes from document to document; then with all blocks, half of them and none computing their
activations again. Each measurement is a process of its own; the median of the rounds counts. Memory is what the process
takes more at its peak than before its first step; on a GPU what PyTorch has reserved.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import peft
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tuner.contest import say
from benchmarks.tuner.material import MEDIAN, SIGMA
from kaito_flows.containers.tuner.attention import NAME, use_attention
from kaito_flows.containers.tuner.data import Split
from kaito_flows.containers.tuner.gauges import peaks
from kaito_flows.containers.tuner.job import Estimate
from kaito_flows.containers.tuner.recompute import keep_what_fits

TOKENS, STEPS, BLOCKS = 8192, 3, 8
LENGTHS = (512, 2048, 8192)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("LAYOUT", "LENGTH", "KEPT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        layout, length, kept = given.measure
        sys.stdout.write(json.dumps(measure(layout, int(length), int(kept))))
        return
    say("| sequence length | padding in rows | time, of rows | memory, of rows | tokens/s, in rows | tokens/s, ours |")
    say("|---:|---:|---:|---:|---:|---:|")
    for length in LENGTHS:
        rows, ours = compared(given.rounds, ("rows", length, BLOCKS), ("documents", length, BLOCKS))
        ratios = [f"{ours[key] / rows[key]:.2f}" for key in ("seconds", "bytes")]
        speeds = [f"{each['tokens'] / each['seconds']:,.0f}" for each in (rows, ours)]
        say(f"| {length:,} | {rows['padding']:.1%} | {' | '.join(ratios)} | {' | '.join(speeds)} |")
    say("\n| blocks that compute again | time, of all | memory, of all | MB |")
    say("|---:|---:|---:|---:|")
    found = compared(given.rounds, *(("documents", 2048, kept) for kept in (0, BLOCKS // 2, BLOCKS)))
    for again, each in zip((BLOCKS, BLOCKS // 2, 0), found, strict=True):
        ratios = [f"{each[key] / found[0][key]:.2f}" for key in ("seconds", "bytes")]
        say(f"| {again} | {' | '.join(ratios)} | {each['bytes'] / 1e6:,.0f} |")


def compared(rounds: int, *cases: tuple[str, int, int]) -> list[dict[str, float]]:
    """Measure each case in each round, in turn; return the medians."""
    found: list[list[dict[str, float]]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, results in zip(cases, found, strict=True):
            command = [sys.executable, "-m", "benchmarks.tuner.blocks", "--measure", *map(str, case)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return [{key: statistics.median(r[key] for r in results) for key in results[0]} for results in found]


def measure(layout: str, length: int, kept: int) -> dict[str, float]:
    """CPU or GPU seconds of a step, bytes at the peak, tokens, and padding as a share of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = AutoConfig.for_model("llama", vocab_size=1024, num_hidden_layers=BLOCKS, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    wrapper = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=TARGETS))
    for parameter in wrapper.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    keep_what_fits(model, Estimate(1, 1), 1 + kept)
    if layout == "documents":
        use_attention(model, NAME)
    batch = documents(length).batch(torch.tensor([0]), device, flat=layout == "documents")
    given = {"position_ids": batch.position_ids, "use_cache": False}
    given |= batch.documents.arguments(torch.bfloat16) if batch.documents else {}
    before = psutil.Process().memory_info().rss if device.type == "cpu" else torch.cuda.memory_reserved()
    seconds = []
    wrapper.train()
    for _ in range(STEPS):
        begun = time.process_time() if device.type == "cpu" else time.monotonic()
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=batch.input_ids, **given).last_hidden_state
        hidden.float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.process_time() if device.type == "cpu" else time.monotonic()) - begun)
    peak = peaks(device)["peak_host_bytes" if device.type == "cpu" else "peak_gpu_bytes"]
    padding = batch.input_ids.numel() / batch.tokens - 1
    return {"seconds": min(seconds), "bytes": float(peak - before), "tokens": batch.tokens, "padding": padding}


def documents(longest: int) -> Split:
    """One row with documents of the contest's lengths, cut at `longest`."""
    random = np.random.RandomState(0)
    positions: list[int] = []
    while len(positions) < TOKENS:
        drawn = math.exp(random.normal(math.log(MEDIAN), SIGMA))
        positions += range(min(longest, max(2, round(drawn)), TOKENS - len(positions)))
    row = torch.tensor(positions)[None]
    return Split(torch.randint(1024, row.shape), torch.ones_like(row), row, torch.tensor([row.shape[1]]))


if __name__ == "__main__":
    main()
