"""The training loop, from the first step, or from the last checkpoint, to the last step.

    evaluate, if due ─► step: micro-batches ─► clip ─► AdamW ─► log, if due ─► checkpoint, if due ─┐
           ▲───────────────────────────────────────────────────────────────────────────────────────┘

Each step is a function of the adapter, the optimizer's moments and the step's number: rows, learning rate and random
numbers (dropout) all come from the number. So a run that was killed ends with the same bytes as one that was not: on a
CPU; on a GPU attention's gradients are added up in no fixed order.

Several processes (`world`) share the rows of each step, and end it with the same adapter, since they add up gradients
and counts: the loss curve is that of one process, but for rounding. Dropout's masks are drawn by each process for its
own rows, so that with dropout another number of processes sees other masks. All stop after the same step.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from kaito_flows.containers.program import emit
from kaito_flows.containers.tuner import checkpoint
from kaito_flows.containers.tuner.checkpoint import State
from kaito_flows.containers.tuner.data import Batch, Dataset, epoch_order
from kaito_flows.containers.tuner.divergence import held_out_fault, is_suspect, note_loss, training_fault
from kaito_flows.containers.tuner.evaluation import Evaluation, batches_of, evaluate
from kaito_flows.containers.tuner.gauges import Gauges
from kaito_flows.containers.tuner.job import CONFIG_NAME, TrainingArguments, TrainingConfig
from kaito_flows.containers.tuner.loss import loss_sum
from kaito_flows.containers.tuner.memory import is_out_of_memory
from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.outcome import OUT_OF_MEMORY, best_step, evaluation_at, published_step, without_gain
from kaito_flows.containers.tuner.portion import Portion, ShortOfMemory, fitting
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.recompute import recompute_all
from kaito_flows.containers.tuner.schedule import learning_rate, steps_in_all
from kaito_flows.containers.tuner.shipping import Shipping
from kaito_flows.containers.tuner.world import ALONE, World
from kaito_flows.errors import ConfigError, DivergedError, PreemptedError, disk_errors

__all__ = ["steps_of", "train"]

RECENT = 20
"""Steps whose median time stands for the next ones'."""


def steps_of(arguments: TrainingArguments, dataset: Dataset) -> tuple[int, int]:
    """Return the optimizer steps of an epoch, and those of the whole training."""
    steps_an_epoch = math.ceil(len(dataset.train) / arguments.rows_a_step)
    return steps_an_epoch, steps_in_all(arguments, steps_an_epoch)


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
    on_first_step: Callable[[], None] = lambda: None,
) -> State:
    """Train the adapter to the end, or until it gets no better, and return what there is to tell of it.

    The adapter is then that of `outcome.published_step`.

    Args:
        adapted: the model with its adapter.
        dataset: what it learns, and what it is measured on.
        config: how.
        identity: of the run: only its own checkpoints are gone on from.
        results: where checkpoints and the history are written.
        preemption: whether SIGTERM came.
        world: the processes that train it together.
        shipping: where checkpoints are kept beside `results`; only process 0 needs it.
        on_first_step: is called after the first optimizer step that this process makes.

    Raises:
        ConfigError: the best adapter is asked for, and no data is held out to tell it by.
        ShortOfMemory: a single document does not fit.
        DivergedError: the loss or a gradient is no longer finite, or the loss stays far above where it began; the last
            checkpoint that was right stays.
        PreemptedError: SIGTERM came; a checkpoint was saved.
        DiskFullError: no space left for a checkpoint.
        RegistryError: whether there is a checkpoint in the registry cannot be seen.
        KilledError: (code `peer-lost`) another process is gone.
    """
    arguments = config.TrainingArguments
    if arguments.load_best_model_at_end and dataset.validation is None:
        place = f"{CONFIG_NAME}: TrainingArguments.load_best_model_at_end"
        raise ConfigError("there is no held-out data", place=place, hint="a train_test_split below 1")
    rows = len(dataset.train)
    steps_an_epoch, total = steps_of(arguments, dataset)
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
    if state.recompute_all:
        recompute_all(adapted.model)
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
        # The pipeline's own checkpoints, which `save_strategy: no` does not mean, need not be more than two: whether
        # one was right is known only after another step.
        keep = 2 if arguments.save_strategy == "no" else max(2, arguments.save_total_limit)
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

    def diverged(what: str, step: int | None = None) -> DivergedError:
        """An error that says what is wrong, and which checkpoint was still right: one after which a step went well."""
        bad = checkpoints / checkpoint.name_of(state.step)
        if world.first:
            shutil.rmtree(bad, ignore_errors=True)
        found = [path.name for path in checkpoints.glob("step-*") if path != bad]
        kept = f"; the checkpoint of step {int(max(found).removeprefix('step-'))} is kept" if found else ""
        hint = "lower learning_rate, raise warmup_steps, or lower max_grad_norm"
        return DivergedError(f"the {what}{kept}", place=f"step {step or state.step} of {total}", hint=hint)

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

    patience = arguments.early_stopping_patience
    held_out, fullest = dataset.validation, dataset.train.most_documents

    def halved(of: Literal["training", "evaluation"]) -> Callable[[Portion], None]:
        def on_halved(portion: Portion) -> None:
            if of == "training":
                state.portion = portion
            else:
                state.evaluation_portion = portion
            remember(OUT_OF_MEMORY, {"step": state.step, "of": of, "at_once": str(portion)})

        return on_halved

    def recompute_more() -> bool:
        """Let blocks that kept their activations compute them again, in all processes; return whether any did."""
        if not arguments.gradient_checkpointing or not any(world.totals(recompute_all(adapted.model))):
            return False
        state.recompute_all = True
        remember("recompute-all", {"step": state.step})
        return True

    def measure(portion: Portion) -> Evaluation | None:
        assert held_out is not None
        return evaluate(adapted, held_out, portion, stop=lambda: preemption.requested, world=world)

    def gradients(portion: Portion) -> tuple[torch.Tensor, int, int, bool]:
        """Add up the gradients of the next step; return summed loss, tokens, targets, and whether SIGTERM came."""
        epoch, within = divmod(state.step, steps_an_epoch)
        order = epoch_order(rows, arguments.seed, epoch, shuffle=config.DatasetConfig.shuffle_dataset)
        chosen = order[within * arguments.rows_a_step : (within + 1) * arguments.rows_a_step]
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(_step_seed(arguments.seed, state.step, world.rank))
        summed, tokens, targets, short = torch.zeros((), device=adapted.device), 0, 0, None
        try:
            for batch in batches_of(adapted, dataset.train, chosen, portion, world):
                if preemption.requested and world.size == 1:
                    raise stop()
                summed += _backward(adapted, batch)
                tokens, targets = tokens + batch.tokens, targets + batch.targets
        except (RuntimeError, MemoryError) as exc:
            if adapted.sharded or not is_out_of_memory(exc):
                raise
            short = ShortOfMemory(str(exc))
        *counts, stopping, shorts = world.totals(tokens, targets, preemption.requested, short is not None)
        if shorts:
            raise short or ShortOfMemory()
        return summed, int(counts[0]), int(counts[1]), stopping > 0

    gauges = Gauges(adapted.device)
    step_seconds: deque[float] = deque(maxlen=RECENT)
    evaluation_seconds = 0.0
    window_tokens, window_seconds = 0, 0.0
    adapted.peft.train()
    while True:
        if held_out and evaluation_due(state.step) and evaluation_at(state, state.step) is None:
            begun = time.monotonic()
            portion = state.evaluation_portion or Portion(arguments.per_device_eval_batch_size)
            measured, _ = fitting(measure, portion, held_out.most_documents, halved("evaluation"))
            if measured is None:
                raise stop()
            if fault := held_out_fault(state.history, measured.loss):
                raise diverged(fault)
            evaluation_seconds = time.monotonic() - begun
            remember("evaluation", {"step": state.step, **asdict(measured)})
            if arguments.load_best_model_at_end and best_step(state.history) == state.step and world.first:
                adapted.keep_as_best()
            if patience and without_gain(state.history, arguments.early_stopping_threshold) >= patience:
                remember("stopped-early", {"step": state.step, "evaluations": patience}, total=total)
                break
        if state.step == total:
            break

        begun = time.monotonic()
        rate = learning_rate(arguments, state.step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        portion = state.portion or Portion(arguments.per_device_train_batch_size)
        (summed, tokens, targets, stopping), _ = fitting(
            gradients, portion, fullest, halved("training"), recompute_more
        )
        loss, norm = _finish_gradients(adapted, summed, targets, arguments, world)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(f"loss is {loss}, gradient norm {norm}", state.step + 1)
        optimizer.step()

        seconds = time.monotonic() - begun
        if not step_seconds:
            on_first_step()
        step_seconds.append(seconds)
        window_seconds, window_tokens = window_seconds + seconds, window_tokens + tokens
        state.step += 1
        state.seconds += seconds
        state.tokens += tokens
        state.targets += targets
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.last_loss = loss
        note_loss(state, loss)
        if fault := training_fault(state, shuffled=config.DatasetConfig.shuffle_dataset):
            raise diverged(fault)
        state.window_loss, state.window_targets = state.window_loss + loss * targets, state.window_targets + targets

        if state.step % arguments.logging_steps == 0 or state.step == total:
            to_come = sum(map(evaluation_due, range(state.step, total + 1))) if held_out else 0
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
            eta = round(left, 1)
            remember("progress", facts, total=total, tokens_per_second=speed, eta_seconds=eta, **gauges.read())
            window_tokens, window_seconds = 0, 0.0
        if stopping and world.size > 1:
            raise stop()
        # What may be going wrong pushes out no checkpoint that was right.
        if checkpoint_due(state.step) and not is_suspect(state):
            save()
    if published_step(state, arguments) != state.step:
        adapted.return_to_best()
        world.copy(list(adapted.parameters.values()))
    return state


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


def _step_seed(seed: int, step: int, rank: int) -> int:
    # Seeds that are near to each other would give streams that are.
    text = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
