"""Processes that outlive the one that started them, and can be found again.

A process has a folder:

    job.json       its job file          stdout   its events, one JSON object a line
    process.json   pid, start time       stderr   its logs
    exit           its exit code, written when it ends, by the shell that waits for it

Who comes later finds it running, finds how it ended, or finds neither: then it was killed with its shell. Starting is
done under a lock, so two who come at once start one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kaito_flows.errors import disk_errors

# The shell outlives the program by one write. Its trap keeps SIGTERM from ending it first, and is not inherited.
_SHELL = 'trap : TERM INT; "$@" >stdout 2>stderr; echo $? >exit.partial; mv exit.partial exit'

KILLED = 137
_POLL_SECONDS = 0.2
_started: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True, slots=True)
class Process:
    """A process by its folder."""

    folder: Path

    @property
    def pid(self) -> int | None:
        """The pid of its shell, which leads its session; None when it does not run."""
        try:
            record = json.loads((self.folder / "process.json").read_bytes())
            pid = int(record["pid"])
            if child := _started.get(pid):
                child.poll()
            process = psutil.Process(pid)
            # A pid is used again; the start time tells the processes apart.
            if process.create_time() != record["created"] or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
        return pid

    @property
    def exit_code(self) -> int | None:
        """How it ended: None while it runs or when it was never started, 137 when it was killed with its shell."""
        if not (self.folder / "process.json").exists() or self.pid is not None:
            return None
        # Asked twice: the file may have come between the two looks.
        return _read_exit(self.folder) if (self.folder / "exit").exists() else KILLED

    def start(self, program: str, job: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start `python -m <program> job.json` in the folder, detached; what an earlier start left is put aside.

        Raises:
            DiskFullError: no space left.
        """
        with disk_errors(self.folder):
            for name in ("stdout", "stderr"):
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name).replace(self.folder / f"{name}.previous")
            (self.folder / "exit").unlink(missing_ok=True)
            _write(self.folder / "job.json", job)
            (self.folder / "stdout").touch()
            child = subprocess.Popen(
                ["/bin/sh", "-c", _SHELL, "sh", sys.executable, "-m", program, "job.json"],
                cwd=self.folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            _started[child.pid] = child
            created = psutil.Process(child.pid).create_time()
            _write(self.folder / "process.json", {"pid": child.pid, "created": created, "program": program})

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield each line of standard output as it comes, from the first one on, until the process has ended."""
        ended, rest = False, b""
        with (self.folder / "stdout").open("rb") as out:
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
                    ended = self.pid is None
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
        pid = self.pid
        if pid is None:
            return False
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, sent)
            deadline = time.monotonic() + grace_seconds
            while time.monotonic() < deadline:
                if self.pid is None:
                    return True
                time.sleep(0.05)
        return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: who starts, replaces or removes a process there does so alone."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def _read_exit(folder: Path) -> int:
    text = (folder / "exit").read_text().strip()
    return int(text) if text.isdigit() else KILLED
