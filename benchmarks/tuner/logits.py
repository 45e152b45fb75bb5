"""What making logits in chunks costs and saves: a step's loss and gradients at once, and in chunks, in turn.

    python -m benchmarks.tuner.logits                 # a minute on a CPU

A model with one block and a large vocabulary, 4096 tokens that are all learned. Each measurement is a process of its
own; the median of the rounds counts. Memory is what the process takes more at its peak than before its first step; on a
GPU what PyTorch has reserved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tuner.contest import say
from kaito_flows.containers.tuner import loss
from kaito_flows.containers.tuner.data import Batch
from kaito_flows.containers.tuner.gauges import peaks
from kaito_flows.containers.tuner.loss import chunk_of, loss_sum

TOKENS, LENGTH, STEPS = 4096, 512, 2
# The vocabularies of Phi-3, Llama 3 and Gemma.
VOCABULARIES = (32_064, 128_256, 256_000)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, type=int, metavar=("VOCABULARY", "CHUNK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        sys.stdout.write(json.dumps(measure(*given.measure)))
        return
    say("| vocabulary | time, of all at once | memory, of all at once | MB at once | MB in chunks |")
    say("|---:|---:|---:|---:|---:|")
    for vocabulary in VOCABULARIES:
        found: dict[int, list[dict[str, float]]] = {TOKENS: [], chunk_of(vocabulary): []}
        for _ in range(given.rounds):
            for chunk, results in found.items():
                command = [sys.executable, "-m", "benchmarks.tuner.logits", "--measure", str(vocabulary), str(chunk)]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        whole, parts = (
            {key: statistics.median(r[key] for r in results) for key in results[0]} for results in found.values()
        )
        ratios = [f"{parts[key] / whole[key]:.2f}" for key in ("seconds", "bytes")]
        say(f"| {vocabulary:,} | {' | '.join(ratios)} | {whole['bytes'] / 1e6:,.0f} | {parts['bytes'] / 1e6:,.0f} |")


def measure(vocabulary: int, chunk: int) -> dict[str, float]:
    """CPU or GPU seconds of a step, and bytes at the peak."""
    loss.CHUNK, loss.LOGITS = chunk, 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, num_attention_heads=8, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    ids = torch.randint(vocabulary, (TOKENS // LENGTH, LENGTH), device=device)
    positions = torch.arange(LENGTH, device=device).repeat(TOKENS // LENGTH, 1)
    batch = Batch(ids, positions, torch.arange(TOKENS, device=device), ids.flatten(), TOKENS)
    before = psutil.Process().memory_info().rss if device.type == "cpu" else torch.cuda.memory_reserved()
    seconds = []
    for _ in range(STEPS):
        begun = time.process_time() if device.type == "cpu" else time.monotonic()
        loss_sum(model, batch).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.process_time() if device.type == "cpu" else time.monotonic()) - begun)
    peak = peaks(device)["peak_host_bytes" if device.type == "cpu" else "peak_gpu_bytes"]
    return {"seconds": min(seconds), "bytes": float(peak - before)}


if __name__ == "__main__":
    main()
