"""The shapes of a model's linear modules, and how many parameters LoRA adds to them."""

from __future__ import annotations

from collections.abc import Iterable

from kaito_flows.errors import PlanError
from kaito_flows.presets.loader import Architecture

__all__ = ["linear_shapes", "lora_parameters"]


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of each kind of linear module that decoder blocks have, by its name in transformers."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    query = architecture.heads * architecture.head_dim
    key = architecture.kv_heads * architecture.head_dim
    return {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key),
        "v_proj": (hidden, key),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        # Phi-3
        "qkv_proj": (hidden, query + 2 * key),
        "gate_up_proj": (hidden, 2 * inner),
        # Phi-2 and Falcon
        "dense": (query, hidden),
        "fc1": (hidden, inner),
        "fc2": (inner, hidden),
        "query_key_value": (hidden, query + 2 * key),
        "dense_h_to_4h": (hidden, inner),
        "dense_4h_to_h": (inner, hidden),
    }


def lora_parameters(architecture: Architecture, targets: Iterable[str], r: int, *, dora: bool = False) -> int:
    """Return how many parameters LoRA adds: `r x (inputs + outputs)` a module, with DoRA one more for each output.

    Raises:
        PlanError: a target is no linear module.
    """
    shapes, names = linear_shapes(architecture), tuple(targets)
    if unknown := [name for name in names if name not in shapes]:
        raise PlanError(f"the shape of module {unknown[0]!r} is not known", place="LoraConfig.target_modules")
    each = (r * sum(shapes[name]) + (shapes[name][1] if dora else 0) for name in names)
    return architecture.layers * sum(each)
