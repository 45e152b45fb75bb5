"""The real command in a process of its own, a Prefect server for it to talk to, and files to give it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.settings import PREFECT_API_URL
from prefect_harness import harness

PROGRAM = Path(sys.executable).with_name("kaito-flows")
WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")
# Of what a terminal gets: colours, the cursor hidden and moved, a line cleared.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

MakeWorkspace = Callable[..., Path]


@dataclass
class Command:
    """`kaito-flows` with a home of its own."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """Start it."""
        return subprocess.Popen([PROGRAM, *map(str, arguments)], env=self._environment(), **options)

    def __call__(self, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            [PROGRAM, *map(str, arguments)],
            env=self._environment(), input=stdin, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def facts(self, *arguments: str | Path) -> Any:
        """Run it with `--json` and return what it prints."""
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def on_terminal(self, *arguments: str | Path, interrupt_at: str = "") -> Terminal:
        """Run it on a terminal of 80 columns; press Ctrl-C there once `interrupt_at` is seen."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        child = self.start(
            *arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 65536)
            except OSError:  # the last one who had the terminal open is gone
                break
            if interrupt_at and re.search(interrupt_at, _ESCAPES.sub("", seen.decode(errors="replace"))):
                os.write(master, b"\x03")
                interrupt_at = ""
        os.close(master)
        return Terminal(child.wait(timeout=60), seen.decode())

    def processes(self) -> list[str]:
        """The jobs and services of this home that run: each works in a folder there."""
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(self.home):
                    found.append(" ".join(process.cmdline()))
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def end_all(self) -> None:
        """End what a test has left running."""
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(self.home):
                    process.send_signal(signal.SIGKILL)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_FLOWS_", "COLUMNS", "LINES"))}
        return {**inherited, "TERM": "xterm-256color", "KAITO_FLOWS_HOME": str(self.home), **self.environment}


@dataclass(frozen=True)
class Terminal:
    """What came of a command on a terminal."""

    exit_code: int
    raw: str

    @property
    def lines(self) -> list[str]:
        """Every line that was drawn, those that were overwritten too; the echo of Ctrl-C ends one."""
        return [line for line in re.split(r"[\r\n]+|\^C", _ESCAPES.sub("", self.raw)) if line]


@pytest.fixture(scope="session")
def prefect_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server for all commands, so that none has to bring up its own."""
    with harness():
        yield {
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        }


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """The command, without a Prefect server."""
    command = Command(tmp_path / "home")
    yield command
    command.end_all()


@pytest.fixture
def run(tmp_path: Path, prefect_environment: dict[str, str]) -> Iterator[Command]:
    """The command, with a Prefect server."""
    command = Command(tmp_path / "home", dict(prefect_environment))
    yield command
    command.end_all()


def chats(rows: int = 48) -> list[list[dict[str, str]]]:
    """Chats that a tiny model can learn: what is asked is answered in the same words."""
    return [
        [
            {"role": "user", "content": f"Say {WORDS[i % 8]} {i}."},
            {"role": "assistant", "content": f"{WORDS[i % 8]} {i}"},
        ]
        for i in range(rows)
    ]


def write_workspace(
    folder: Path, name: str = "tiny", *, urls: list[str] | None = None, steps: int = 8, preset: str = "tiny-phi-3",
    image: str = "localhost/test/tiny:latest",
) -> Path:  # fmt: skip
    """Write a Workspace that is tuned in seconds, and its data; return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": chats()}), folder / "chats.parquet")
    config = {
        "TrainingArguments": {
            "max_steps": steps, "learning_rate": 0.01, "max_length": 128, "save_steps": 5, "logging_steps": 1,
        },
        "DatasetConfig": {"train_test_split": 0.8},
    }  # fmt: skip
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name},
        "resource": {"labelSelector": {"matchLabels": {"app": name}}},
        "tuning": {
            "preset": {"name": preset},
            "method": "qlora",
            "config": "tuning",
            "input": {"urls": urls or ["file:chats.parquet"]},
            "output": {"image": image},
        },
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "tuning"},
        "data": {"training_config.yaml": yaml.safe_dump({"training_config": config})},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump_all([workspace, config_map]))
    return path


@pytest.fixture
def make_workspace(tmp_path: Path) -> MakeWorkspace:
    """Write a Workspace file; return its path."""
    return lambda *arguments, **options: write_workspace(tmp_path / "files", *arguments, **options)


@dataclass(frozen=True)
class Tuned:
    """A Workspace that was tuned and is served, and what the command said of it."""

    command: Command
    file: Path
    output: str


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, prefect_environment: dict[str, str]) -> Iterator[Tuned]:
    """`tiny`, tuned once by the real command in a pipe."""
    folder = tmp_path_factory.mktemp("tuned")
    command = Command(folder / "home", dict(prefect_environment))
    file = write_workspace(folder / "files")
    try:
        done = command("tune", file)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        yield Tuned(command, file, done.stdout)
    finally:
        command.end_all()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it comes to hold in that time."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


@pytest.fixture
def write_file(make_workspace: MakeWorkspace) -> Callable[[str], Path]:
    """Write a file with that text; return its path."""

    def write(text: str) -> Path:
        path = make_workspace().with_name("given.yaml")
        path.write_text(text)
        return path

    return write
