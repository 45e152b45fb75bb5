"""Checkpoints: what a killed training goes on from. Tensors are in safetensors, the rest is JSON; nothing is pickled.

    checkpoints/step-000020/   adapter.safetensors  optimizer.safetensors  best.safetensors  state.json

`best.safetensors`, the adapter at the best evaluation so far, is there when the best one is to be published.

A checkpoint is written under another name, synced, and renamed; `state.json` comes last, with the hashes of the others.
There is no random state in it: each step draws from a seed of its own (see `training`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from kaito_flows.containers.program import strict
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.portion import Portion
from kaito_flows.containers.tuner.world import World
from kaito_flows.errors import KaitoFlowsError, disk_errors

__all__ = ["ADAPTER", "BEST", "OPTIMIZER", "STATE", "State", "load_newest", "name_of", "resume", "save"]

ADAPTER, OPTIMIZER, BEST, STATE = "adapter.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class State:
    """Where a training stands after `step` optimizer steps.

    `tokens` (without padding) and `targets` were seen so far; `window_loss` and `window_targets` are sums since the
    last logged step; `history` has every logged step and evaluation; `seconds` were spent in steps; `first_losses` and
    `recent_losses` are what `divergence` compares. `portion` and `evaluation_portion` are what went through the device
    at once, where that was not what the config says; `recompute_all` says that memory thought to be left was not.
    """

    identity: str
    step: int = 0
    tokens: int = 0
    targets: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    window_loss: float = 0.0
    window_targets: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    portion: Portion | None = None
    evaluation_portion: Portion | None = None
    recompute_all: bool = False


@dataclass(frozen=True, slots=True)
class _Saved:
    state: State
    sha256: dict[str, str]


def name_of(step: int) -> str:
    """Return the name of the folder with the checkpoint of that step."""
    return f"step-{step:06d}"


def save(folder: Path, state: State, adapted: Adapted, optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Write a checkpoint under `folder`, then remove all but the newest `keep`; return its path.

    Raises:
        DiskFullError: no space left; the checkpoints before are still there.
    """
    final = folder / name_of(state.step)
    partial = folder / f".{final.name}"
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            hashes = {
                ADAPTER: _write(partial / ADAPTER, _tensors(adapted.parameters)),
                OPTIMIZER: _write(partial / OPTIMIZER, _tensors(_optimizer_state(adapted, optimizer))),
            }
            if adapted.best:
                hashes[BEST] = _write(partial / BEST, _tensors(adapted.best))
            _write(partial / STATE, json.dumps(asdict(_Saved(state, hashes))).encode())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def resume(state: State | None, adapted: Adapted, optimizer: torch.optim.Optimizer, world: World) -> State | None:
    """Bring every process to where process 0 stands after `load_newest`, which the others did not call."""
    told = world.tell("resume", lambda: asdict(state) if state else None)
    world.copy(list(adapted.parameters.values()))
    if told is None or world.size == 1:
        return state
    moments = world.tell(
        "moments", lambda: {key: list(t.shape) for key, t in _optimizer_state(adapted, optimizer).items()}
    )
    if not world.first:
        _restore(optimizer, adapted, {key: torch.zeros(shape) for key, shape in moments.items()})
    world.copy(list(_optimizer_state(adapted, optimizer).values()))
    return strict(State, told, place="resume")


def load_newest(folder: Path, identity: str, adapted: Adapted, optimizer: torch.optim.Optimizer) -> State | None:
    """Bring model and optimizer to the newest whole checkpoint of that identity, and return its state, if there is one.

    Checkpoints that are damaged, or of another identity, are removed.
    """
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir(), reverse=True):
            try:
                if not path.name.startswith("step-"):
                    raise ValueError("not finished")
                saved = strict(_Saved, json.loads((path / STATE).read_bytes()), place=path.name)
                if saved.state.identity != identity:
                    raise ValueError("of another run")
                adapter, moments = (_read(path / name, saved.sha256[name]) for name in (ADAPTER, OPTIMIZER))
                best = _read(path / BEST, saved.sha256[BEST]) if BEST in saved.sha256 else {}
                if adapter.keys() != adapted.parameters.keys():
                    raise ValueError("of another adapter")
            except (OSError, ValueError, KeyError, KaitoFlowsError, safetensors.SafetensorError) as exc:
                _logger.warning("the checkpoint %s is removed: %s", path, exc)
                shutil.rmtree(path, ignore_errors=True)
                continue
            with torch.no_grad():
                for name, parameter in adapted.parameters.items():
                    parameter.copy_(adapter[name])
            _restore(optimizer, adapted, moments)
            adapted.best.update(best)
            return saved.state
    return None


def _optimizer_state(adapted: Adapted, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}:{name}": value
        for name, parameter in adapted.parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _restore(optimizer: torch.optim.Optimizer, adapted: Adapted, tensors: Mapping[str, torch.Tensor]) -> None:
    for key_and_name, tensor in tensors.items():
        key, _, name = key_and_name.partition(":")
        parameter = adapted.parameters[name]
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    # Made in memory: safetensors' own writing has an error of its own for a full disk.
    return safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _write(path: Path, content: bytes) -> str:
    """Write and sync a file, and return its sha256."""
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path.name} is damaged")
    return safetensors.torch.load(content)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
