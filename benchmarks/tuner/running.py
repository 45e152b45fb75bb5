"""A contestant's processes, watched from outside: what they tell of each step, and what they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

__all__ = ["FailedError", "Outcome", "Step", "run_in_turn"]


class FailedError(Exception):
    """A contestant did not get to its end; the message has the last lines of what it said."""


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step's end: seconds since the start, the process's CPU seconds, tokens up to here, and the loss."""

    seconds: float
    cpu_seconds: float
    tokens: int
    loss: float


@dataclass(slots=True)
class Outcome:
    """One job from its first process's start to its last one's end.

    `peak_bytes` is the largest process's resident memory, `gpu` the GPU's by PyTorch's own count.
    """

    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    gpu: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    trained_share: float = 0.0

    def speed(self, warm_up: int) -> tuple[float, float]:
        """Tokens per second and per CPU second, without padding, from the end of step `warm_up` to the last one's."""
        first, last = self.steps[warm_up - 1], self.steps[-1]
        tokens = last.tokens - first.tokens
        return tokens / (last.seconds - first.seconds), tokens / (last.cpu_seconds - first.cpu_seconds)


def run_in_turn(commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str]) -> Outcome:
    """Run `python -m` with each of the commands, one after the other.

    Raises:
        FailedError: one ended with another exit code than 0.
    """
    outcome, began = Outcome(), time.monotonic()
    for command in commands:
        errors = folder / "stderr.txt"
        with errors.open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=subprocess.PIPE, stderr=err, text=True, env={**os.environ, **environment},
            )  # fmt: skip
        watched = psutil.Process(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            _note(json.loads(line), outcome, watched, began)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        outcome.cpu_seconds += usage.ru_utime + usage.ru_stime
        outcome.peak_bytes = max(outcome.peak_bytes, usage.ru_maxrss * 1024)
        if process.returncode:
            said = "\n".join([*errors.read_text(errors="replace").splitlines()[-25:], json.dumps(outcome.facts)])
            raise FailedError(f"{' '.join(command)} ended with {process.returncode}\n{said}")
    outcome.seconds = time.monotonic() - began
    return outcome


def _note(event: dict[str, Any], outcome: Outcome, process: psutil.Process, began: float) -> None:
    kind = event.pop("event")
    if kind == "progress":
        took = process.cpu_times()
        seconds = time.monotonic() - began
        outcome.steps.append(Step(seconds, took.user + took.system, event["tokens"], event["loss"]))
        if "trained_tokens" in event:
            outcome.trained_share = event["trained_tokens"] / event["tokens"]
    elif kind == "memory":
        outcome.gpu = event
    elif kind in ("completed", "failed"):
        outcome.facts = event
        if "metrics" in event:
            trained = event["metrics"]["training"]
            outcome.trained_share = trained["trained_tokens"] / trained["tokens"]
