"""How much memory a service takes on its device, part by part, from the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from kaito_flows.planning.memory import BYTES, FRAGMENTATION, RUNTIME_BYTES
from kaito_flows.planning.shapes import lora_parameters
from kaito_flows.presets.loader import Preset

__all__ = ["ADAPTER_RANK", "ServingMemory", "cache_bytes", "serving_memory"]

# An adapter's rank is in its image, which is not read before the plan holds: most are 8 to 64, on every linear layer.
ADAPTER_RANK = 64


@dataclass(frozen=True, slots=True)
class ServingMemory:
    """Bytes on the device (on each GPU) while the longest prompt with its answer is worked on."""

    weights: int
    adapters: int
    cache: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.cache + self.activations + self.overhead

    def as_dict(self) -> dict[str, int]:
        """The parts and their sum, in bytes."""
        parts = ("weights", "adapters", "cache", "activations", "overhead", "total")
        return {name: getattr(self, name) for name in parts}


def cache_bytes(preset: Preset, tokens: int, dtype: str = "bfloat16") -> int:
    """Return the bytes of the keys and values of so many tokens.

    Key and value, for each layer and each of its key-value heads: 2 x layers x kv heads x head size x bytes of a number
    (Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023, section 3;
    there with as many key-value heads as heads: 800 KB for a token of OPT-13B).
    """
    shape = preset.architecture
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype] * tokens


def serving_memory(
    preset: Preset, *, max_model_len: int, adapters: int = 0, dtype: str = "bfloat16", gpus: int = 1
) -> ServingMemory:
    """Return what serving takes: whole weights, adapters, the cache of one answer at a time, and the prompt's pass.

    The server makes one answer at a time, so the cache is that of `max_model_len` tokens. PEFT keeps adapters in
    float32. The pass over a prompt holds, of one block at a time, its input and output (2 hidden), the projections and
    the attention's output (3 query + 3 key) and the MLP's gate, up and product (3 intermediate); logits are of the last
    token alone. A cache that grows by a token is copied, one layer at a time. With several `gpus`, each has its part of
    the layers: of weights, adapters and cache, and one block more, for they are divided by whole blocks.
    """
    shape, parameters, number = preset.architecture, preset.parameters, BYTES[dtype]
    weights = parameters.total * number
    lora = 4 * adapters * lora_parameters(shape, preset.linear_modules, ADAPTER_RANK)
    cache = cache_bytes(preset, max_model_len, dtype)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = number * (2 * shape.hidden_size + 3 * query + 3 * key + 3 * shape.intermediate_size)
    activations = max_model_len * block + shape.vocab_size * 4
    if gpus > 1:
        # Embedding and head are on one GPU each.
        ends = (parameters.total - parameters.linear) * number
        layers = -(-shape.layers // gpus) + 1
        weights = parameters.linear * number * layers // shape.layers + ends
        lora, cache = lora * layers // shape.layers, cache * layers // shape.layers
    copied = cache_bytes(preset, max_model_len, dtype) // shape.layers
    overhead = RUNTIME_BYTES + copied + int(FRAGMENTATION * (activations + cache))
    return ServingMemory(weights, lora, cache, activations, overhead)
