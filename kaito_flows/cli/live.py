"""A run while it runs: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from threading import RLock
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from kaito_flows.cli import output

PLAIN_INTERVAL_SECONDS = 10.0


class Live:
    """Listens to a run and shows it; `quiet` shows nothing (for `--json`)."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lock = RLock()
        self._told_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away: what is printed next stands on a line of its own."""
        with self._lock:
            self._end_bar()

    def starting_server(self) -> None:
        """Say that the run brings its own Prefect server up, which takes a while before anything else is seen."""
        if not self._quiet:
            self._say(f"{'prefect':<16} starting a server for this run")

    def on_event(self, stage: str, event: Mapping[str, Any]) -> None:
        """Show one event of the run; called from the threads of its tasks."""
        if self._quiet:
            return
        with self._lock:
            match event["event"]:
                case "finished":
                    self._end_bar()
                    self._say(f"{stage:<16} done in {event['seconds']:.1f} s")
                case "planned":
                    for row in event["rows"]:
                        for text in output.pair(row["item"], row["value"], 21):
                            self._say(text)
                case "progress" if "total" in event:
                    self._progress(event)
                case "evaluation":
                    self._say(f"{stage:<16} held-out loss {event['loss']:.3f} at step {event['step']}")
                case "resumed":
                    self._say(f"{stage:<16} going on from the checkpoint at step {event['step']}")
                case "reused":
                    self._say(f"{stage:<16} nothing to do, {event['digest'][:19]} has the same inputs")
                case "stage":
                    for text in output.hanging(stage, event["name"], 17):
                        self._say(text)

    def _progress(self, event: Mapping[str, Any]) -> None:
        if self._console.is_terminal:
            if self._bar is None:
                columns = (
                    TextColumn("tune"),
                    # What stands beside it takes up to 54 columns; the `^C` that a terminal echoes, two.
                    BarColumn(min(40, max(10, self._console.width - 56))),
                    MofNCompleteColumn(),
                    TextColumn("loss {task.fields[loss]:.3f}"),
                    TextColumn("{task.fields[speed]:.0f} tok/s"),
                    TextColumn("{task.fields[eta]} left"),
                )
                self._bar = Progress(*columns, console=self._console, transient=True)
                self._task = self._bar.add_task("tune", total=event["total"], **_fields(event))
                self._bar.start()
            elif self._task is not None:
                self._bar.update(self._task, **_fields(event))
        elif time.monotonic() - self._told_at >= PLAIN_INTERVAL_SECONDS or event["step"] == event["total"]:
            self._told_at = time.monotonic()
            self._say(
                f"{'tune':<16} step {event['step']}/{event['total']}  loss {event['loss']:.3f}  "
                f"{event['tokens_per_second']:.0f} tokens/s  {_clock(event['eta_seconds'])} left"
            )

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            output.line(text)
            sys.stdout.flush()


def _fields(event: Mapping[str, Any]) -> dict[str, Any]:
    """What the bar shows of a step."""
    eta = _clock(event["eta_seconds"])
    return {"completed": event["step"], "loss": event["loss"], "speed": event["tokens_per_second"], "eta": eta}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
