"""Processes that outlive the one that started them, and can be found again.

A process has a folder:

    job.json   its job file                  stdout   its events, one JSON object a line
    alive      locked as long as it runs     stderr   its logs
    pid        who leads its session         exit     its exit code, written by the shell that waits for it

The lock on `alive` is held by an open file that the shell and the program inherit: it ends with the last of them,
however they end, and no pid that was given to somebody else is taken for it. Who comes later finds it running, finds
how it ended, or finds neither: then it was killed. It is started under another lock, so two who come at once start one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaito_flows.errors import disk_errors

# Written into room that was taken before the start (`1<>`): on a disk that is full by then there is no other. The trap
# keeps SIGTERM from ending the shell before the program, and is not inherited.
_SHELL = 'trap : TERM INT; printf %s $$ 1<>pid; "$@" >stdout 2>stderr; printf %s $? 1<>exit'
_ROOM = " " * 20

KILLED = 137
_POLL_SECONDS = 0.2
# A long-lived program needs none of these; what fetches weights may need all of them.
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH", re.IGNORECASE)
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its folder."""

    folder: Path

    @property
    def running(self) -> bool:
        """Whether the shell or the program lives."""
        _children[:] = [child for child in _children if child.poll() is None]
        try:
            with (self.folder / "alive").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def exit_code(self) -> int | None:
        """How it ended: None while it runs or when it was never started, 137 when it was killed with its shell."""
        if self.running:
            return None
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "exit").read_text().strip()
            return int(text) if text.isdigit() else KILLED
        return None

    def start(
        self, program: str, job: Mapping[str, Any], environment: Mapping[str, str], *, secrets: bool = False
    ) -> None:
        """Start `python -m <program> job.json` in the folder, detached; what an earlier start left is put aside.

        Variables whose names speak of secrets are handed on only with `secrets`.

        Raises:
            DiskFullError: no space left.
        """
        inherited = {name: value for name, value in os.environ.items() if secrets or not _SECRET.search(name)}
        with disk_errors(self.folder), self._lock() as alive:
            for name in ("stdout", "stderr"):
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).replace(self.folder / f"{name}.previous")
            for name in ("pid", "exit"):
                (self.folder / name).write_text(_ROOM)
            (self.folder / "stdout").touch()
            partial = self.folder / "job.json.partial"
            partial.write_text(json.dumps(job, indent=1))
            partial.replace(self.folder / "job.json")
            _children.append(
                subprocess.Popen(
                    ["/bin/sh", "-c", _SHELL, "sh", sys.executable, "-m", program, "job.json"],
                    cwd=self.folder,
                    env={**inherited, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[alive],
                )
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield each line of standard output as it comes, from the first one on, until the process has ended."""
        ended, rest = False, b""
        with contextlib.suppress(FileNotFoundError), (self.folder / "stdout").open("rb") as out:
            while True:
                chunk = out.read()
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        event = json.loads(line)
                        if isinstance(event, dict):
                            yield event
                if ended:
                    return
                if not chunk:
                    ended = not self.running
                    if not ended:
                        time.sleep(_POLL_SECONDS)

    def log_tail(self, lines: int = 5) -> list[str]:
        """The last lines of standard error that are not blank."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "stderr").read_text("utf-8", errors="replace")
            return [line for line in text.splitlines() if line.strip()][-lines:]
        return []

    def stop(self, grace_seconds: float = 30.0) -> bool:
        """End it: SIGTERM to its session, SIGKILL after the grace time. Return whether it ran."""
        ran = self.running
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline, told = time.monotonic() + grace_seconds, False
            while time.monotonic() < deadline:
                if not self.running:
                    return ran
                # While somebody of it lives, its session's number is given to nobody else.
                if not told and (leader := self._leader()):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(leader, number)
                    told = True
                time.sleep(0.05)
        return True

    def _leader(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "pid").read_text().strip()
            return int(text) if text.isdigit() else None
        return None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """Take the lock on `alive`, and yield the open file that holds it."""
        with (self.folder / "alive").open("wb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)  # somebody looks whether it runs
            yield lock.fileno()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: who starts, replaces or removes a process there does so alone."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
