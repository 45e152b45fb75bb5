"""The training loop, from the first step, or from the last checkpoint, to the last step.

    evaluate, if due ─► step: micro-batches ─► clip ─► AdamW ─► log, if due ─► checkpoint, if due ─┐
           ▲───────────────────────────────────────────────────────────────────────────────────────┘

Each step is a function of the adapter, the optimizer's moments and the step's number: rows, learning rate and random
numbers (dropout) all come from the number. So a run that was killed ends with the same bytes as one that was not.

Several processes (`world`) share the rows of each step, and end it with the same adapter, since they add up gradients
and counts: the loss curve is that of one process, but for rounding. Dropout's masks are drawn by each process for its
own rows, so that with dropout another number of processes sees other masks. All stop after the same step.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kaito_flows.containers.program import emit
from kaito_flows.containers.tuner import checkpoint
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Batch, Dataset, epoch_order
from kaito_flows.containers.tuner.evaluation import batches_of, evaluate
from kaito_flows.containers.tuner.job import TrainingArguments, TrainingConfig
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.schedule import learning_rate, steps_in_all
from kaito_flows.containers.tuner.shipping import Shipping
from kaito_flows.containers.tuner.world import ALONE, World
from kaito_flows.errors import DivergedError, PreemptedError, disk_errors

__all__ = ["evaluation_at", "train", "training_facts"]

RECENT = 20
"""Steps whose median time stands for the next ones'."""


def train(
    adapted: Adapted,
    dataset: Dataset,
    config: TrainingConfig,
    identity: str,
    results: Path,
    preemption: Preemption,
    *,
    world: World = ALONE,
    shipping: Shipping | None = None,
) -> State:
    """Train the adapter to the end, and return what there is to tell of it.

    Args:
        adapted: the model with its adapter.
        dataset: what it learns, and what it is measured on.
        config: how.
        identity: of the run: only its own checkpoints are gone on from.
        results: where checkpoints and the history are written.
        preemption: whether SIGTERM came.
        world: the processes that train it together.
        shipping: where checkpoints are kept beside `results`; only process 0 needs it.

    Raises:
        DivergedError: the loss or a gradient is no longer finite; the last checkpoint stays.
        PreemptedError: SIGTERM came; a checkpoint was saved.
        DiskFullError: no space left for a checkpoint.
        RegistryError: whether there is a checkpoint in the registry cannot be seen.
        KilledError: (code `peer-lost`) another process is gone.
    """
    arguments = config.TrainingArguments
    rows = len(dataset.train)
    steps_an_epoch = math.ceil(rows / arguments.rows_a_step)
    total = steps_in_all(arguments, steps_an_epoch)
    optimizer = torch.optim.AdamW(
        adapted.parameters.values(),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        fused=True,
    )
    if adapted.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]

    checkpoints = results / "checkpoints"
    found = None
    if world.first:
        found = checkpoint.load_newest(checkpoints, identity, adapted, optimizer)
        if shipping and shipping.fetch(checkpoints, newer_than=found.step if found else 0):
            found = checkpoint.load_newest(checkpoints, identity, adapted, optimizer)
    found = checkpoint.resume(found, adapted, optimizer, world)
    state = found or State(identity)
    saved_step = state.step
    history = results / "history.jsonl"
    if world.first:
        with disk_errors(results):
            results.mkdir(parents=True, exist_ok=True)
            history.write_text("".join(_line(entry) for entry in state.history), encoding="utf-8")
    if found:
        emit("resumed", step=state.step)

    def remember(event: str, facts: dict[str, Any], **shown: Any) -> None:
        state.history.append({"event": event, **facts})
        if world.first:
            with disk_errors(results), history.open("a", encoding="utf-8") as out:
                out.write(_line(state.history[-1]))
            emit(event, **facts, **shown)

    def save() -> None:
        nonlocal saved_step
        saved_step = state.step
        if not world.first:
            return
        # The pipeline's own checkpoint, which `save_strategy: no` does not mean, need not be more than one.
        keep = 1 if arguments.save_strategy == "no" else arguments.save_total_limit
        path = checkpoint.save(checkpoints, state, adapted, optimizer, keep=keep)
        emit("checkpoint", step=state.step)
        # After the last step comes the adapter itself.
        if shipping and state.step < total and not preemption.requested:
            shipping.offer(path, state.step)

    def stop() -> PreemptedError:
        if state.step > saved_step:
            save()
        kept = f"; the checkpoint of step {saved_step} is saved" if saved_step else ""
        message = f"stopped by SIGTERM after step {state.step} of {total}{kept}"
        return PreemptedError(message, place="tuner", hint="start the same job again: it goes on from there")

    def evaluation_due(step: int) -> bool:
        if step in (0, total):
            return True
        every = {"no": 0, "steps": arguments.eval_steps, "epoch": steps_an_epoch}[arguments.eval_strategy]
        return bool(every) and step % every == 0

    def checkpoint_due(step: int) -> bool:
        return (
            step == total
            or step % (steps_an_epoch if arguments.save_strategy == "epoch" else arguments.save_steps) == 0
        )

    step_seconds: deque[float] = deque(maxlen=RECENT)
    evaluation_seconds = 0.0
    window_tokens, window_seconds = 0, 0.0
    adapted.peft.train()
    while True:
        if dataset.validation and evaluation_due(state.step) and evaluation_at(state, state.step) is None:
            begun = time.monotonic()
            batch_size = arguments.per_device_eval_batch_size
            measured = evaluate(adapted, dataset.validation, batch_size, stop=lambda: preemption.requested, world=world)
            if measured is None:
                raise stop()
            if not math.isfinite(measured.loss):
                raise _diverged(f"held-out loss is {measured.loss}", state.step, total, saved_step)
            evaluation_seconds = time.monotonic() - begun
            remember("evaluation", {"step": state.step, **asdict(measured)})
        if state.step == total:
            return state

        begun = time.monotonic()
        epoch, within = divmod(state.step, steps_an_epoch)
        order = epoch_order(rows, arguments.seed, epoch, shuffle=config.DatasetConfig.shuffle_dataset)
        chosen = order[within * arguments.rows_a_step : (within + 1) * arguments.rows_a_step]
        rate = learning_rate(arguments, state.step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_step_seed(arguments.seed, state.step, world.rank))

        summed, tokens, targets = torch.zeros((), device=adapted.device), 0, 0
        for batch in batches_of(adapted, dataset.train, chosen, arguments.per_device_train_batch_size, world):
            if preemption.requested and world.size == 1:
                raise stop()
            summed += _backward(adapted, batch)
            tokens, targets = tokens + batch.tokens, targets + batch.targets
        counted = world.totals(tokens, targets, preemption.requested)
        tokens, targets, stopping = int(counted[0]), int(counted[1]), counted[2] > 0
        loss, norm = _finish_gradients(adapted, summed, targets, arguments, world)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}, gradient norm {norm}"
            raise _diverged(what, state.step + 1, total, saved_step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.monotonic() - begun
        step_seconds.append(seconds)
        window_seconds, window_tokens = window_seconds + seconds, window_tokens + tokens
        state.step += 1
        state.seconds += seconds
        state.tokens += tokens
        state.targets += targets
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.last_loss = loss
        state.window_loss, state.window_targets = state.window_loss + loss * targets, state.window_targets + targets

        if state.step % arguments.logging_steps == 0 or state.step == total:
            to_come = sum(map(evaluation_due, range(state.step, total + 1))) if dataset.validation else 0
            left = statistics.median(step_seconds) * (total - state.step) + evaluation_seconds * to_come
            facts = {
                "step": state.step,
                "epoch": round(state.step / steps_an_epoch, 4),
                "loss": state.window_loss / state.window_targets,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": state.tokens,
            }
            speed = round(window_tokens / window_seconds, 1)
            state.window_loss, state.window_targets = 0.0, 0
            remember("progress", facts, total=total, tokens_per_second=speed, eta_seconds=round(left, 1))
            window_tokens, window_seconds = 0, 0.0
        if stopping and world.size > 1:
            raise stop()
        if checkpoint_due(state.step):
            save()


def _backward(adapted: Adapted, batch: Batch) -> torch.Tensor:
    """Add the gradients of the batch's summed loss, and return that sum.

    Of the sum and not of a mean: divided by thousands of tokens, gradients of float16 activations would vanish.
    """
    loss = loss_sum(adapted.model, batch, masked=adapted.masked)
    loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
    return loss.detach()


def _finish_gradients(
    adapted: Adapted, summed: torch.Tensor, targets: int, arguments: TrainingArguments, world: World
) -> tuple[float, float]:
    """Turn summed gradients into the mean over the step's targets, clipped; return the mean loss and the norm."""
    if world.size > 1:
        for parameter in adapted.parameters.values():
            # Where a step has fewer rows than there are processes, some have none.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [p.grad for p in adapted.parameters.values() if p.grad is not None]
    world.add([*gradients, summed])
    norm = torch.nn.utils.get_total_norm(gradients) / targets
    limit = arguments.max_grad_norm
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0) / targets if limit else torch.ones_like(norm) / targets
    torch._foreach_mul_(gradients, scale)
    loss, measured = torch.stack([summed / targets, norm]).tolist()
    return loss, measured


def evaluation_at(state: State, step: int) -> dict[str, Any] | None:
    """Return what was measured on held-out data after that step, if it was: loss, perplexity, tokens."""
    for entry in state.history:
        if entry["event"] == "evaluation" and entry["step"] == step:
            return {key: entry[key] for key in ("loss", "perplexity", "tokens")}
    return None


def training_facts(state: State, dataset: Dataset, arguments: TrainingArguments) -> dict[str, Any]:
    """Return the facts of a finished training: `tokens` read without padding, `trained_tokens` of them learned."""
    steps_an_epoch = math.ceil(len(dataset.train) / arguments.rows_a_step)
    return {
        "steps": state.step,
        "epochs": round(state.step / steps_an_epoch, 4),
        "tokens": state.tokens,
        "trained_tokens": state.targets,
        "first_loss": state.first_loss,
        "last_loss": state.last_loss,
    }


def _step_seed(seed: int, step: int, rank: int) -> int:
    # Seeds that are near to each other would give streams that are.
    text = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _diverged(what: str, step: int, total: int, saved_step: int) -> DivergedError:
    kept = f"; the checkpoint of step {saved_step} is kept" if saved_step else ""
    hint = "lower learning_rate, raise warmup_steps, or lower max_grad_norm"
    return DivergedError(f"the {what}{kept}", place=f"step {step} of {total}", hint=hint)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
