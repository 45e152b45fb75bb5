"""Steps, time and cost of a training, from the prepared data and the model's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kaito_flows.planning.machine import Machine
from kaito_flows.presets.loader import Preset, Sku

__all__ = [
    "cost_usd",
    "evaluation_flops",
    "machine_flops_per_second",
    "parallel_share",
    "rows_a_step",
    "sku_flops_per_second",
    "training_flops",
    "training_steps",
]

# The share of a GPU's dense peak that a step reaches: 31 % (Hugging Face's stock trainer) to 50 % (torchtune) of it,
# back-computed from published tokens per second of 4-bit and LoRA training on an A100.
GPU_SHARE = 0.4
# What a GPU keeps of its speed beside others. Only the adapter's gradients travel, once a step (0.1 GB for Phi-3-mini
# and r 16), over the node's bus or over the network. Assumed, not measured.
NODE_SHARE = 0.95
NETWORK_SHARE = 0.85
# And with the model divided among GPUs: then all weights travel, twice a step.
DIVIDED_SHARE = 0.6
# bfloat16 FLOPs a second of one core in training: SmolLM2-135M with QLoRA ran at 252 tokens a second on two cores.
CORE_FLOPS = 79e9
# An unlisted GPU: an A10's peak, low for all that have bfloat16.
UNKNOWN_TFLOPS = 125.0


def training_steps(rows: int, config: Mapping[str, Any]) -> int:
    """Return the optimizer steps for `rows` packed rows: `max_steps` if it is set, else by epochs, begun ones whole."""
    arguments = config["TrainingArguments"]
    if arguments["max_steps"] > 0:
        return int(arguments["max_steps"])
    epochs: float = arguments["num_train_epochs"]
    return math.ceil(epochs * math.ceil(rows / rows_a_step(config)))


def rows_a_step(config: Mapping[str, Any]) -> int:
    """Return the packed rows of an optimizer step, which all GPUs share: their number does not change the training."""
    arguments = config["TrainingArguments"]
    return int(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"])


def training_flops(preset: Preset, adapter_parameters: int, length: int, *, recompute: float) -> float:
    """Return the floating-point operations for one trained token, in rows of `length` tokens.

    Forward 2N and backward 2N, for frozen weights need no gradient of their own (N: linear layers and output head);
    6 for each adapter parameter; causal attention, 2 x length x query features a layer forward and 2.5 times that
    backward (FlashAttention-2, section 4.1); `recompute` is the share of blocks that repeat their forward pass.
    """
    shape, blocks = preset.architecture, preset.parameters.linear
    whole = blocks + shape.vocab_size * shape.hidden_size
    attention = 2.0 * length * shape.heads * shape.head_dim * shape.layers
    again = recompute * (2.0 * (blocks + adapter_parameters) + attention)
    return 4.0 * whole + 6.0 * adapter_parameters + 3.5 * attention + again


def evaluation_flops(preset: Preset, length: int) -> float:
    """Return the floating-point operations for one token of a forward pass."""
    shape = preset.architecture
    whole = preset.parameters.linear + shape.vocab_size * shape.hidden_size
    return 2.0 * whole + 2.0 * length * shape.heads * shape.head_dim * shape.layers


def parallel_share(gpus: int, nodes: int, *, divided: bool = False) -> float:
    """Return what each GPU keeps of its speed when `gpus` on each of `nodes` train together."""
    if divided:
        return DIVIDED_SHARE
    if nodes > 1:
        return NETWORK_SHARE
    return NODE_SHARE if gpus > 1 else 1.0


def sku_flops_per_second(sku: Sku | None) -> float:
    """Return what one GPU of the size reaches in training; None is a size that is not known."""
    tflops = sku.tflops if sku is not None and sku.tflops else UNKNOWN_TFLOPS
    return tflops * 1e12 * GPU_SHARE


def machine_flops_per_second(machine: Machine, skus: tuple[Sku, ...]) -> float:
    """Return what this machine reaches in training, on its GPU if it has one."""
    if not machine.gpu_model:
        return machine.cores * CORE_FLOPS
    # "NVIDIA A100 80GB PCIe" is a table's "NVIDIA A100"; the longest name that fits is the most precise.
    known = [sku for sku in skus if machine.gpu_model.startswith(sku.gpu_model)]
    return sku_flops_per_second(max(known, key=lambda sku: len(sku.gpu_model), default=None))


def cost_usd(seconds: float, price_usd_hour: float) -> float:
    """Return the price of the node for that time."""
    return seconds / 3600 * price_usd_hour
