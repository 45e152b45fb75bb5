"""Who is told what happens in a run: the run's log, and whoever listens (the command line does)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from prefect import get_run_logger
from prefect.exceptions import MissingContextError

from kaito_flows.errors import KaitoFlowsError
from kaito_flows.platforms import Event

Listener = Callable[[str, Event], None]

# A run's tasks work in threads with a copy of its context, so each run has its own listeners.
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, event)` for everything that the runs inside the block tell."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def tell(stage: str, event: str, **facts: Any) -> None:
    """Tell every listener of this run."""
    for listener in _listeners.get():
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more: the work goes on
            listener(stage, {"event": event, **facts})


def log(message: str, *, warning: bool = False) -> None:
    """Write a line to the run's log; outside of a run there is none."""
    with contextlib.suppress(MissingContextError):
        (get_run_logger().warning if warning else get_run_logger().info)(message)


@contextlib.contextmanager
def stage(name: str, doing: str = "") -> Iterator[None]:
    """Tell that a stage begins, and how it ended and after how many seconds."""
    start = time.monotonic()
    tell(name, "started", doing=doing)
    try:
        yield
    except KaitoFlowsError as exc:
        log(str(exc), warning=True)
        tell(name, "stopped", seconds=time.monotonic() - start)
        raise
    tell(name, "finished", seconds=time.monotonic() - start)


def relay(name: str) -> Callable[[Event], None]:
    """Return a callback that passes a job's events on: all to listeners, the telling ones to the log."""
    logged_at = 0.0

    def on_event(event: Event) -> None:
        nonlocal logged_at
        tell(name, **event)
        if event["event"] == "progress":
            last = event["step"] == event["total"]
            # Ten thousand lines take the client half a minute to send.
            if not last and time.monotonic() - logged_at < 10.0:
                return
            logged_at = time.monotonic()
        if event["event"] != "completed":
            log(sentence(event))

    return on_event


def _gpu(event: Event) -> str:
    memory, utilization = event.get("gpu_memory_bytes"), event.get("gpu_utilization")
    return "".join(
        [f", GPU {memory / 1e9:.1f} GB" if memory else "", f" at {utilization} %" if utilization is not None else ""]
    )


def sentence(event: Event) -> str:
    """An event of a job as one line for people."""
    match event["event"]:
        case "progress":
            return (
                f"step {event['step']}/{event['total']}: loss {event['loss']:.3f}, "
                f"{event['tokens_per_second']:.0f} tokens/s, {event['eta_seconds']:.0f} s to go{_gpu(event)}"
            )
        case "evaluation":
            return f"held-out loss {event['loss']:.3f} (perplexity {event['perplexity']:.2f}) at step {event['step']}"
        case "first-step":
            return f"the first step was made {event['seconds']:.1f} s after the start of the program"
        case "checkpoint":
            return f"checkpoint at step {event['step']}"
        case "out-of-memory":
            return f"out of memory in {event['of']} at step {event['step']}: it goes on with {event['at_once']} at once"
        case "recompute-all":
            return f"out of memory in training at step {event['step']}: from now on all activations are computed again"
        case "stopped-early":
            return (
                f"stopped after step {event['step']} of {event['total']}: "
                f"{event['evaluations']} evaluations in a row were no better"
            )
        case "resumed":
            return f"resumed from the checkpoint at step {event['step']}"
        case "stage":
            return str(event["name"])
        case kind:
            return f"{kind}: " + ", ".join(f"{k}={v}" for k, v in event.items() if k != "event")
