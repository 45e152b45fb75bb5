"""From the names that a user gives for LoRA's targets to the linear modules that the model has."""

from __future__ import annotations

from collections.abc import Sequence

from kaito_flows.errors import ConfigError
from kaito_flows.presets.loader import Preset

__all__ = ["ALL_LINEAR", "resolve_targets"]

ALL_LINEAR = "all-linear"
_PLACE = "training_config.yaml: LoraConfig.target_modules"


def resolve_targets(preset: Preset, requested: Sequence[str] | str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the model's module names for what was asked for, in the model's order, and notes on what was changed.

    `all-linear` means every linear layer in the blocks. A separate projection that the model has fused with others
    (`q_proj` on Phi-3) becomes the fused module: PEFT alone would leave it out and say nothing.

    Raises:
        ConfigError: (code `unknown-target-module`) a name that the model does not have.
    """
    names = [requested] if isinstance(requested, str) else list(requested)
    chosen: set[str] = set()
    fused: dict[str, list[str]] = {}
    for name in names:
        # "self_attn.q_proj" names the same modules as "q_proj": a model has no two kinds of one name.
        last = name.rsplit(".", 1)[-1]
        if name == ALL_LINEAR:
            chosen |= set(preset.linear_modules)
        elif last in preset.linear_modules:
            chosen.add(last)
        elif last in preset.fused_modules:
            chosen.add(preset.fused_modules[last])
            fused.setdefault(preset.fused_modules[last], []).append(last)
        else:
            raise ConfigError(
                f"{preset.name} has no linear module {name!r}",
                place=_PLACE,
                hint=f"it has {', '.join(preset.linear_modules)}; or write {ALL_LINEAR}",
                code="unknown-target-module",
            )
    if not chosen:
        raise ConfigError("names no module", place=_PLACE, hint=f"write {ALL_LINEAR}")
    notes = [f"{preset.name} has {', '.join(parts)} fused in {name}: that is adapted" for name, parts in fused.items()]
    return tuple(name for name in preset.linear_modules if name in chosen), tuple(notes)
