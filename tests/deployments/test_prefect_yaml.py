"""The deployment as users run it: a server, a process worker, `prefect deploy --all`, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kaito_flows.platforms import LocalPlatform
from kaito_flows.platforms.processes import Process
from kaito_flows.settings import Settings
from kaito_flows.workspace import load_workspace

BIN = Path(sys.executable).parent
NAME = "tiny-deployed"
# Long enough that the tuner still works when the retried flow comes.
STEPS = 2000


class Prefect:
    """A Prefect server on loopback with a home of its own, and the `prefect` command against it."""

    def __init__(self, home: Path, kaito_home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "KAITO_FLOWS_HOME": str(kaito_home),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.log = (home / "log").open("wb")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> None:
        """Start a `prefect` command that stays."""
        child = subprocess.Popen(
            [BIN / "prefect", *command], env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        self.processes.append(child)

    def __call__(self, *command: str, stdin: str = "") -> str:
        """Run a `prefect` command to its end."""
        done = subprocess.run(
            [BIN / "prefect", "--no-prompt", *command],
            env=self.environment, input=stdin, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, run_id: str) -> dict[str, Any]:
        """What the server knows of a flow run."""
        found: dict[str, Any] = httpx.get(f"{self.api}/flow_runs/{run_id}", timeout=30).json()
        return found

    def logs(self) -> str:
        """The messages of the newest 200 log lines."""
        newest = {"limit": 200, "sort": "TIMESTAMP_DESC"}
        return "\n".join(e["message"] for e in httpx.post(f"{self.api}/logs/filter", json=newest, timeout=30).json())

    def wait_for(self, run_id: str, state: str, seconds: float) -> None:
        """Wait until the flow run is in that state."""
        deadline = time.monotonic() + seconds
        while (now := self.run(run_id)["state"]["type"]) != state:
            assert time.monotonic() < deadline, f"{now}, not {state}, after {seconds} s: {self.run(run_id)['state']}"
            assert now != "FAILED" or state == "FAILED", self.run(run_id)["state"]
            time.sleep(0.3)

    def close(self) -> None:
        """End everything."""
        for process in reversed(self.processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.log.close()


@pytest.fixture
def prefect(tmp_path: Path, home: Path) -> Iterator[Prefect]:
    (tmp_path / "prefect").mkdir()
    prefect = Prefect(tmp_path / "prefect", home)
    prefect.start("server", "start", "--host", "127.0.0.1", "--port", str(prefect.port))
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{prefect.api}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.3)
        yield prefect
    finally:
        LocalPlatform(Settings()).delete(NAME)
        prefect.close()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    words = ("red", "green", "blue", "black")
    chats = [
        [
            {"role": "user", "content": f"Say {words[i % 4]} {i}."},
            {"role": "assistant", "content": f"{words[i % 4]} {i}"},
        ]
        for i in range(48)
    ]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    config = {
        "TrainingArguments": {
            "max_steps": STEPS,
            "learning_rate": 0.002,
            "max_length": 512,
            "save_steps": 10,
            "logging_steps": 1,
        },
        "DatasetConfig": {"train_test_split": 0.8},
    }
    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME},
        "resource": {"labelSelector": {"matchLabels": {"app": NAME}}},
        "tuning": {
            "preset": {"name": "tiny-phi-3"},
            "method": "qlora",
            "config": "c",
            "input": {"urls": ["file:chats.parquet"]},
            "output": {"image": f"localhost/test/{NAME}:latest"},
        },
    }
    text = yaml.safe_dump({"training_config": config})
    config_map = {"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"training_config.yaml": text}}
    path = tmp_path / "workspace.yaml"
    path.write_text(yaml.safe_dump_all([document, config_map]))
    return path


def flow_process(run_id: str) -> psutil.Process:
    """The process that a worker started for a flow run: its environment names the run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            try:
                named = process.environ().get("PREFECT__FLOW_RUN_ID") in (run_id, run_id.replace("-", ""))
                if named and "kaito_flows.containers" not in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.2)
    raise AssertionError("no process of the flow run")


def test_a_run_that_is_killed_in_training_and_retried_goes_on_where_it_was(
    prefect: Prefect, workspace: Path, home: Path, repository_root: Path
) -> None:
    prefect("work-pool", "create", "local", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", str(repository_root / "deployments/prefect.yaml"))
    [deployment] = httpx.post(f"{prefect.api}/deployments/filter", json={}, timeout=30).json()
    [schedule] = deployment["schedules"]
    assert not schedule["active"], "the weekly schedule is shipped inactive"
    assert "workspace" in deployment["parameter_openapi_schema"]["properties"]
    prefect.start("worker", "start", "--pool", "local")

    parameters = {**load_workspace(workspace, "local").as_parameters(), "serve": False}
    prefect("deployment", "run", "tune-workspace/local", "--params", "-", stdin=json.dumps(parameters))
    [flow_run] = httpx.post(f"{prefect.api}/flow_runs/filter", json={}, timeout=30).json()
    run_id = flow_run["id"]

    jobs = home / "jobs" / NAME
    deadline = time.monotonic() + 120
    while not any('"checkpoint"' in p.read_text() for p in jobs.glob("*/stdout")):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    flow_process(run_id).kill()
    [folder] = jobs.glob("*/")
    tuner = (folder / "pid").read_text()
    prefect.wait_for(run_id, "CRASHED", 60)
    assert Process(folder).running, "the tuner outlives the flow"
    assert (folder / "pid").read_text() == tuner

    # The runner and the worker both report the crash, about a second apart; the later one would undo the retry.
    time.sleep(5)
    prefect("flow-run", "retry", run_id)
    prefect.wait_for(run_id, "COMPLETED", 400)
    wanted, deadline = f"step {STEPS}/{STEPS}", time.monotonic() + 30
    while wanted not in (messages := prefect.logs()):
        assert time.monotonic() < deadline, messages
        time.sleep(0.5)  # logs are sent in the background
    assert "resumed from" not in messages, "it was followed, not started again"
    assert prefect.run(run_id)["run_count"] == 2
