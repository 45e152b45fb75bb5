"""The training loop, from the first step or from the last checkpoint to the last step."""

from __future__ import annotations

import json
import math
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kaito_flows.containers.program import emit
from kaito_flows.containers.tuner import checkpoint
from kaito_flows.containers.tuner.data import Split, epoch_order
from kaito_flows.containers.tuner.job import TrainingArguments
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.errors import DivergedError, PreemptedError, disk_errors


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to: the facts for `metrics.json`, and every logged step and evaluation."""

    before: dict[str, Any] | None
    after: dict[str, Any] | None
    training: dict[str, Any]
    history: tuple[dict[str, Any], ...]


def train(
    adapted: Adapted,
    train_split: Split,
    held_out: Split | None,
    arguments: TrainingArguments,
    identity: str,
    results: Path,
) -> Trained:
    """Train the adapter.

    Raises:
        DivergedError: the loss is no longer finite; the last good checkpoint stays.
        PreemptedError: SIGTERM came; a checkpoint was saved.
        DiskFullError: no space left.
    """
    micro, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    steps_per_epoch = max(1, math.ceil(len(train_split) / (micro * accumulation)))
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(steps_per_epoch * arguments.num_train_epochs)
    optimizer = torch.optim.AdamW(
        list(adapted.parameters.values()),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    checkpoints = results / "checkpoints"
    state = checkpoint.load_newest(checkpoints, identity, adapted, optimizer)
    history = _History(results / "history.jsonl", state.history if state else 0)
    step, tokens, trained_tokens = (state.step, state.tokens, state.trained_tokens) if state else (0, 0, 0)
    before = state.before if state else None
    if state:
        emit("resumed", step=step)
    elif held_out is not None:
        before = evaluate(adapted, held_out, arguments.per_device_eval_batch_size)
        history.add("evaluation", step=0, **before)

    def save() -> None:
        checkpoint.save(
            checkpoints,
            checkpoint.State(identity, step, tokens, trained_tokens, before, history.size),
            adapted,
            optimizer,
            keep=max(2, arguments.save_total_limit),
        )
        emit("checkpoint", step=step)

    durations: list[float] = []
    with _sigterm() as told:
        while step < total:
            begun = time.monotonic()
            epoch, within = divmod(step, steps_per_epoch)
            order = epoch_order(len(train_split), arguments.seed, epoch)
            rows = order[within * micro * accumulation : (within + 1) * micro * accumulation]
            batches = [train_split.batch(chunk, adapted.device) for chunk in rows.split(micro)]
            targets = sum(batch.targets for batch in batches)
            rate = arguments.learning_rate * schedule(step, total, arguments)
            for group in optimizer.param_groups:
                group["lr"] = rate

            adapted.peft.train()
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for batch in batches:
                # Each token weighs the same, in whichever micro-step it is.
                part = loss_sum(adapted.base, batch) / max(targets, 1)
                part.backward()
                loss += float(part.detach())
            norm = float(
                torch.nn.utils.clip_grad_norm_(adapted.parameters.values(), arguments.max_grad_norm or math.inf)
            )
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise DivergedError(
                    f"loss {loss}, gradient norm {norm} at step {step + 1}",
                    place=f"step {step + 1} of {total}",
                    hint="lower learning_rate, or raise warmup_steps",
                )
            optimizer.step()

            step += 1
            seen = sum(int((b.position_ids != 0).sum()) + _documents(b.position_ids) for b in batches)
            tokens, trained_tokens = tokens + seen, trained_tokens + targets
            durations.append(time.monotonic() - begun)
            pace = statistics.median(durations[-20:])
            if step % arguments.logging_steps == 0 or step in (1, total):
                facts = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm}
                history.add(
                    "progress",
                    **facts,
                    shown={
                        "total": total,
                        "epoch": round(step / steps_per_epoch, 4),
                        "tokens": tokens,
                        "tokens_per_second": seen / durations[-1],
                        "eta_seconds": round(pace * (total - step), 1),
                    },
                )
            at_epoch = step % steps_per_epoch == 0
            due = {"steps": step % arguments.eval_steps == 0, "epoch": at_epoch, "no": False}[arguments.eval_strategy]
            if due and held_out is not None and step < total:
                history.add("evaluation", step=step, **evaluate(adapted, held_out, arguments.per_device_eval_batch_size))
            if step < total and (step % arguments.save_steps == 0 or (at_epoch and arguments.save_strategy == "epoch")):
                save()
            if told and step < total:
                save()
                raise PreemptedError("told to stop", place=f"step {step} of {total}", hint="start it again to go on")

    after = None
    if held_out is not None:
        after = evaluate(adapted, held_out, arguments.per_device_eval_batch_size)
        history.add("evaluation", step=total, **after)
    losses = [entry["loss"] for entry in history.entries if entry["event"] == "progress"]
    training = {
        "steps": total,
        "epochs": round(total / steps_per_epoch, 4),
        "tokens": tokens,
        "trained_tokens": trained_tokens,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    return Trained(before, after, training, tuple(history.entries))


def schedule(step: int, total: int, arguments: TrainingArguments) -> float:
    """The share of the learning rate for the step after `step`, as transformers' schedules of the same names have it."""
    kind = arguments.lr_scheduler_type
    if kind == "constant":
        return 1.0
    warmup = arguments.warmup_steps or math.ceil(total * arguments.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant_with_warmup":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 1.0 - done) if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@torch.no_grad()
def evaluate(adapted: Adapted, split: Split, batch_size: int) -> dict[str, Any]:
    """The mean loss of the split's target tokens; the training's random state is as before."""
    rng = torch.get_rng_state()
    adapted.peft.eval()
    total, targets = 0.0, 0
    for start in range(0, len(split), batch_size):
        batch = split.batch(slice(start, start + batch_size), adapted.device)
        total += float(loss_sum(adapted.base, batch))
        targets += batch.targets
    torch.set_rng_state(rng)
    loss = total / max(targets, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": targets}


def _documents(positions: torch.Tensor) -> int:
    return int((positions == 0).sum())


class _History:
    """The logged steps and evaluations, in a file that a resumed training goes on writing from its checkpoint."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        lines = path.read_text().splitlines()[:size] if size and path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in lines))

    @property
    def size(self) -> int:
        return len(self.entries)

    def add(self, event: str, shown: dict[str, Any] | None = None, **facts: Any) -> None:
        self.entries.append({"event": event, **facts})
        with disk_errors(self._path), self._path.open("a") as out:
            out.write(json.dumps(self.entries[-1]) + "\n")
        emit(event, **facts, **(shown or {}))


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Collect SIGTERMs while the block lasts: the step that runs is finished first."""
    told: list[int] = []

    def tell(number: int, _: FrameType | None) -> None:
        told.append(number)

    previous = signal.signal(signal.SIGTERM, tell)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, previous)
