"""Checkpoints: adapter, optimizer and random state in safetensors, the rest in JSON; nothing is pickled.

    checkpoints/step-000020/  adapter.safetensors  optimizer.safetensors  state.json

A checkpoint is written under another name, synced and renamed: one that has its name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.errors import disk_errors


@dataclass(frozen=True, slots=True)
class State:
    """Where a training stands after `step` optimizer steps: what it has seen, and the loss it began and is at."""

    identity: str
    step: int
    tokens: int
    trained_tokens: int
    before: dict[str, float] | None
    history: int


def save(folder: Path, state: State, adapted: Adapted, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write a checkpoint, then drop all but the newest `keep`.

    Raises:
        DiskFullError: no space left; the ones before are still there.
    """
    with disk_errors(folder):
        final = folder / f"step-{state.step:06d}"
        partial = folder / f".{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_file({n: p.detach().contiguous() for n, p in adapted.parameters.items()}, partial / "adapter.safetensors")
            save_file(_optimizer_tensors(adapted, optimizer), partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(asdict(state)))
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def load_newest(folder: Path, identity: str, adapted: Adapted, optimizer: torch.optim.Optimizer) -> State | None:
    """Load the newest whole checkpoint of the same identity into model, optimizer and random state."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = State(**json.loads((path / "state.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        if state.identity != identity:
            continue
        for name, tensor in load_file(path / "adapter.safetensors").items():
            adapted.parameters[name].data.copy_(tensor)
        _load_optimizer(adapted, optimizer, load_file(path / "optimizer.safetensors"))
        return state
    return None


def _optimizer_tensors(adapted: Adapted, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if adapted.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in adapted.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    return tensors


def _load_optimizer(adapted: Adapted, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("rng.cuda"))
    for key_and_name, tensor in tensors.items():
        key, _, name = key_and_name.partition(".")
        parameter = adapted.parameters[name]
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
