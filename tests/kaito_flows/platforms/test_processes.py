"""Processes that outlive their starter: found again running, ended, or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kaito_flows.platforms.processes import KILLED, Process

PROGRAM = """
import json, signal, sys, time
job = json.load(open(sys.argv[1]))
def leave(*_):
    print(json.dumps({"event": "left"}), flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
for i in range(job["steps"]):
    print(json.dumps({"event": "progress", "step": i}), flush=True)
    time.sleep(job["pause"])
print("a line that is no event", flush=True)
print("last words", file=sys.stderr)
sys.exit(job["code"])
"""

Start = Callable[..., Process]


def leader(process: Process) -> int:
    return int((process.folder / "pid").read_text())


@pytest.fixture
def start(tmp_path: Path) -> Start:
    (tmp_path / "a_program.py").write_text(PROGRAM)
    (tmp_path / "run").mkdir()

    def _start(steps: int = 3, pause: float = 0.0, code: int = 0) -> Process:
        process = Process(tmp_path / "run")
        job = {"steps": steps, "pause": pause, "code": code}
        process.start("a_program", job, {"PYTHONPATH": str(tmp_path)})
        return process

    return _start


def test_its_events_come_in_order_and_end_with_it(start: Start) -> None:
    process = start(steps=5, pause=0.05, code=3)
    assert [event["step"] for event in process.events()] == [0, 1, 2, 3, 4]
    assert process.exit_code == 3
    assert process.log_tail() == ["last words"]


def test_who_comes_later_reads_the_same_events(start: Start) -> None:
    list(start().events())
    again = Process(start().folder)
    assert len(list(again.events())) == 3
    assert again.exit_code == 0


def test_it_outlives_the_process_that_started_it(tmp_path: Path, start: Start) -> None:
    start(steps=0)
    (tmp_path / "starter.py").write_text(
        "import os, signal, sys\nfrom pathlib import Path\nfrom kaito_flows.platforms.processes import Process\n"
        "job = {'steps': 30, 'pause': 0.1, 'code': 0}\n"
        "Process(Path(sys.argv[1])).start('a_program', job, {'PYTHONPATH': sys.argv[2]})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path / "other"
    folder.mkdir()
    starter = subprocess.run([sys.executable, tmp_path / "starter.py", folder, tmp_path], check=False)
    assert starter.returncode == -signal.SIGKILL
    process = Process(folder)
    assert process.running
    assert len(list(process.events())) == 30
    assert process.exit_code == 0


def test_stopping_lets_it_leave_in_order(start: Start) -> None:
    process = start(steps=100, pause=0.1)
    next(process.events())
    assert process.stop()
    assert process.exit_code == 143
    assert list(process.events())[-1] == {"event": "left"}
    assert not process.stop()


def test_killed_with_its_shell_it_is_told_apart_from_an_end(start: Start) -> None:
    process = start(steps=100, pause=0.1)
    next(process.events())
    os.killpg(leader(process), signal.SIGKILL)
    assert len(list(process.events())) < 100
    assert process.exit_code == KILLED


def test_with_its_shell_killed_it_still_runs_and_can_be_stopped(start: Start) -> None:
    process = start(steps=100, pause=0.1)
    next(process.events())
    os.kill(leader(process), signal.SIGKILL)
    time.sleep(0.3)
    assert process.running
    assert process.stop()
    assert list(process.events())[-1] == {"event": "left"}


def test_its_exit_code_is_kept_although_the_disk_is_full_by_then(start: Start) -> None:
    process = start(steps=1, code=15)
    # Nothing is created or grown when it ends: both files have their room from the start.
    sizes = {name: (process.folder / name).stat().st_size for name in ("pid", "exit")}
    list(process.events())
    assert process.exit_code == 15
    assert {name: (process.folder / name).stat().st_size for name in ("pid", "exit")} == sizes


def test_secrets_of_the_environment_stay_with_the_starter(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY", "A_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    process = start(steps=100, pause=0.1)
    next(process.events())
    environment = Path(f"/proc/{leader(process)}/environ").read_text()
    process.stop()
    assert "hunter2" not in environment
    assert "CUDA_VISIBLE_DEVICES=0" in environment


def test_what_was_never_started_neither_runs_nor_has_ended(tmp_path: Path) -> None:
    process = Process(tmp_path / "nothing")
    assert not process.running
    assert process.exit_code is None
    assert process.log_tail() == []


def test_a_second_start_puts_the_first_log_aside(start: Start) -> None:
    list(start(steps=2).events())
    process = start(steps=1)
    assert len(list(process.events())) == 1
    assert len((process.folder / "stdout.previous").read_text().splitlines()) == 3


def test_events_are_followed_while_they_come(start: Start) -> None:
    process = start(steps=50, pause=0.05)
    events = process.events()
    begin = time.monotonic()
    next(events)
    assert process.running, "the first event is there before the end"
    assert time.monotonic() - begin < 2.5
    process.stop()
