"""How much memory tuning takes on its device, part by part, from the model's shape alone.

The formulas count what a training step of transformers and PEFT keeps. For Phi-3-mini with QLoRA, r 16, they give
1.87 GB of NF4 weights, 0.39 GB of embedding and head, 0.40 GB for the adapter, and per token 0.197 MB of checkpoints
with recompute or 4.66 MB of activations without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kaito_flows import __version__
from kaito_flows.canonical import canonical_digest
from kaito_flows.planning.shapes import linear_shapes, lora_parameters
from kaito_flows.presets.loader import Preset

__all__ = [
    "BYTES",
    "FRAGMENTATION",
    "LOGIT_BYTES",
    "RESERVE",
    "RUNTIME_BYTES",
    "MemoryEstimate",
    "measured_share",
    "memory_key",
    "sharded_memory",
    "tokens_with_logits",
    "tuning_memory",
]

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# bitsandbytes: one absmax for 64 weights, in float32; with double quantisation in 8 bits, with a float32 for each 256.
BLOCK, NESTED_BLOCK = 64, 256
# A logit in the model's type, in float32, its gradient in both: measured 12.0 (benchmarks/tuner/logits.py).
LOGIT_BYTES = 12
# An adapter's parameter in float32: itself, its gradient, and AdamW's two moments.
ADAPTER_BYTES = 16
# CUDA context, cuBLAS workspaces and the libraries' own buffers. On a CPU, what Python and its libraries take (a run
# with a model of 5 million parameters measured 0.83 to 0.91 GB in all).
RUNTIME_BYTES = 900_000_000
# The caching allocator's unused remainders, as a share of what comes and goes in each step.
FRAGMENTATION = 0.1
# Norms keep their input in float32, whatever the model's type is; and the mask of a dropout takes about as much.
NORM_BYTES = DROPOUT_BYTES = 4
# A measurement that is further from the formulas, in either direction, is of something else.
BELIEVED = (0.2, 5.0)
# Of what is needed, how much stays free beside it before blocks keep their activations: this is an estimate.
RESERVE = 0.1


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the device at the peak of a training step, and how many parameters the adapter has.

    Where blocks compute their activations again, `kept_block` is what one takes more that keeps them. `measured` is
    what a training like it was seen to take, as a share of what the formulas say; all parts are multiplied with it.
    """

    weights: int
    adapter: int
    activations: int
    logits: int
    overhead: int
    adapter_parameters: int
    kept_block: int = 0
    measured: float = 1.0

    def scaled(self, share: float) -> MemoryEstimate:
        """Return an estimate by the formulas as one by that measurement."""
        parts = ("weights", "adapter", "activations", "logits", "overhead", "kept_block")
        return replace(self, **{name: int(getattr(self, name) * share) for name in parts}, measured=share)

    @property
    def needed(self) -> int:
        """All of it, and some in reserve: what remains of the device beside that may hold activations."""
        return int(self.total * (1 + RESERVE))

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.logits + self.overhead

    def as_dict(self) -> dict[str, int]:
        """The parts and their sum, in bytes."""
        parts = ("weights", "adapter", "activations", "logits", "overhead", "total")
        return {name: getattr(self, name) for name in parts}


def tuning_memory(preset: Preset, config: Mapping[str, Any], method: str) -> MemoryEstimate:
    """Return what tuning `preset` with a resolved training config takes; `target_modules` holds the model's own names.

    Raises:
        PlanError: a target module whose shape is not known.
    """
    lora, arguments, shape = config["LoraConfig"], config["TrainingArguments"], preset.architecture
    parameters = lora_parameters(shape, lora["target_modules"], lora["r"], dora=lora["use_dora"])
    tokens = _tokens(config)
    activations = _activations(preset, config)
    kept = _block_bytes(preset, config) - _input_bytes(preset, config)
    logits = min(tokens, tokens_with_logits(shape.vocab_size)) * shape.vocab_size * LOGIT_BYTES
    # A 4-bit matrix is expanded for each product; the largest one counts, and its gradient's transposed copy.
    largest = max(i * o for name, (i, o) in linear_shapes(shape).items() if name in preset.linear_modules)
    expanded = 2 * largest * BYTES[config["ModelConfig"]["torch_dtype"]] if method == "qlora" else 0
    return MemoryEstimate(
        weights=_weights(preset, config, method),
        adapter=parameters * ADAPTER_BYTES,
        activations=activations,
        logits=logits,
        overhead=RUNTIME_BYTES + expanded + int(FRAGMENTATION * (activations + logits)),
        adapter_parameters=parameters,
        kept_block=int(tokens * kept * (1 + FRAGMENTATION)) if arguments["gradient_checkpointing"] else 0,
    )


def memory_key(preset: Preset, config: Mapping[str, Any], method: str, device: str) -> str:
    """Return a name for all trainings that take as much on such a device, `gpu` or `cpu`: 16 hex digits."""
    lora, arguments = config["LoraConfig"], config["TrainingArguments"]
    names = ("per_device_train_batch_size", "max_length", "gradient_checkpointing", "packing")
    of = {
        "model": preset.model_id,
        "method": method,
        "device": device,
        "lora": {name: lora[name] for name in ("r", "target_modules", "use_dora", "lora_dropout")},
        "arguments": {name: arguments[name] for name in names},
        "sections": [config["ModelConfig"], config["QuantizationConfig"]],
        "tuner": __version__,
    }
    return canonical_digest(of)[:16]


def measured_share(
    estimate: MemoryEstimate, *, host_bytes: int, gpu_bytes: int | None = None, kept_blocks: int = 0
) -> float | None:
    """Return what a training took, as a share of what the formulas say; None if that is not to be believed.

    Args:
        estimate: the one that it was planned with.
        host_bytes: the most memory that its process had.
        gpu_bytes: the most that its tensors took of a GPU, where there was one.
        kept_blocks: how many blocks kept their activations.
    """
    formulas = (estimate.total + kept_blocks * estimate.kept_block) / estimate.measured
    took = float(host_bytes)
    if gpu_bytes is not None:
        comes_and_goes = max(0.0, gpu_bytes - (estimate.weights + estimate.adapter) / estimate.measured)
        took = gpu_bytes + FRAGMENTATION * comes_and_goes + RUNTIME_BYTES
    share = took / formulas
    return share if BELIEVED[0] <= share <= BELIEVED[1] else None


def tokens_with_logits(vocabulary: int) -> int:
    """Of how many tokens the tuner has logits in memory at once, as its `loss.py` says."""
    return max(512, 2**24 // vocabulary)


def sharded_memory(
    preset: Preset, config: Mapping[str, Any], estimate: MemoryEstimate, processes: int
) -> MemoryEstimate:
    """Return what each of several GPUs takes with the base model divided among them by PyTorch's FSDP2.

    Beside its part, a GPU holds what is gathered: embedding, head and norms throughout, and two blocks, the one that
    computes and the one that is fetched ahead. The adapter is whole on each. Where the head's weights are the
    embedding's, logits are made all at once.
    """
    whole, parameters = BYTES[config["ModelConfig"]["torch_dtype"]], preset.parameters
    all_at_once = _tokens(config) * preset.architecture.vocab_size * LOGIT_BYTES
    logits = all_at_once if preset.architecture.tie_embeddings else estimate.logits
    overhead = estimate.overhead + int(FRAGMENTATION * (logits - estimate.logits))
    block = parameters.linear * whole // preset.architecture.layers
    gathered = (parameters.total - parameters.linear) * whole + 2 * block
    weights = parameters.total * whole // processes + gathered
    return replace(estimate, weights=weights, logits=logits, overhead=overhead, kept_block=0)


def _weights(preset: Preset, config: Mapping[str, Any], method: str) -> int:
    """Linear layers in 4 bits (QLoRA's paper, section 3) or whole; embedding, head and norms always whole."""
    whole = BYTES[config["ModelConfig"]["torch_dtype"]]
    quantization = config["QuantizationConfig"]
    if method != "qlora" or not quantization["load_in_4bit"]:
        return preset.parameters.total * whole
    scale_bits = 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK) if quantization["bnb_4bit_use_double_quant"] else 32 / BLOCK
    linear = preset.parameters.linear
    return int(linear * (4 + scale_bits) / 8) + (preset.parameters.total - linear) * whole


def _activations(preset: Preset, config: Mapping[str, Any]) -> int:
    """What the forward pass keeps for the backward pass.

    With recompute a block keeps its input alone, and one block at a time keeps everything.
    """
    shape, block = preset.architecture, _block_bytes(preset, config)
    if config["TrainingArguments"]["gradient_checkpointing"]:
        return _tokens(config) * (shape.layers * _input_bytes(preset, config) + block)
    return _tokens(config) * shape.layers * block


def _input_bytes(preset: Preset, config: Mapping[str, Any]) -> int:
    """What a block keeps for each token that computes the rest again."""
    return BYTES[config["ModelConfig"]["torch_dtype"]] * preset.architecture.hidden_size


def _block_bytes(preset: Preset, config: Mapping[str, Any]) -> int:
    """What a block keeps for each token.

    These are its two norms' inputs; queries, keys, values, and what attention makes of them; the MLP's gate, its
    activation, and what that is multiplied with; and for each adapted layer its input, which PEFT copies, and what A
    makes of it. A frozen layer needs nothing for its input's gradient. Values that one layer makes with queries and
    keys keep those too, as they were before the rotation. Eager attention adds its scores and probabilities, a value
    of each in two bytes and one in four for each pair of tokens.
    """
    shape, lora, model = preset.architecture, config["LoraConfig"], config["ModelConfig"]
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    value = BYTES[model["torch_dtype"]]
    inputs = [linear_shapes(shape)[name][0] for name in lora["target_modules"]]
    dropped = DROPOUT_BYTES if lora["lora_dropout"] else 0
    kept = 2 * NORM_BYTES * shape.hidden_size + value * (2 * query + 2 * key + 3 * shape.intermediate_size)
    kept += sum(inputs) * (value + dropped) + len(inputs) * lora["r"] * value
    if not {"qkv_proj", "query_key_value"}.isdisjoint(preset.linear_modules):
        kept += value * (query + key)
    if model["attn_implementation"] == "eager":
        kept += 8 * shape.heads * config["TrainingArguments"]["max_length"]
    return int(kept)


def _tokens(config: Mapping[str, Any]) -> int:
    """How many tokens go through the device at once."""
    arguments = config["TrainingArguments"]
    return int(arguments["per_device_train_batch_size"] * arguments["max_length"])
