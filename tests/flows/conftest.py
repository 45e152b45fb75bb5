"""A Prefect server for the flows' tests, and a Workspace that is tuned in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.utilities.callables import parameter_schema
from prefect_harness import harness

from kaito_flows.flows.tune_workspace import tune_workspace

WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")

MakeWorkspace = Callable[..., Path]


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server of the tests' own; without heartbeats, whose thread makes each flow a second longer."""
    with harness(), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def write_chats(path: Path, rows: int = 48) -> None:
    """A parquet with chats that a tiny model can learn: what is asked is answered in the same words."""
    chats = [
        [
            {"role": "user", "content": f"Say {WORDS[i % 8]} {i}."},
            {"role": "assistant", "content": f"{WORDS[i % 8]} {i}"},
        ]
        for i in range(rows)
    ]
    pq.write_table(pa.table({"messages": chats}), path)


@pytest.fixture
def make_workspace(tmp_path: Path) -> MakeWorkspace:
    """Write a Workspace file for `tiny-phi-3`, with changes to its sections; return its path."""

    def make(name: str = "tiny", method: str = "qlora", config: dict[str, Any] | None = None, **tuning: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        write_chats(folder / "chats.parquet")
        arguments = {"max_steps": 8, "learning_rate": 0.01, "max_length": 128, "save_steps": 2, "logging_steps": 1}
        sections = {"TrainingArguments": arguments, "DatasetConfig": {"train_test_split": 0.8}}
        for section, values in (config or {}).items():
            sections[section] = {**sections.get(section, {}), **values}
        workspace = {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": name},
            "resource": {"labelSelector": {"matchLabels": {"app": name}}},
            "tuning": {
                "preset": {"name": "tiny-phi-3"},
                "method": method,
                "config": "tuning",
                "input": {"urls": ["file:chats.parquet"]},
                "output": {"image": f"localhost/test/{name}:latest"},
                **tuning,
            },
        }
        text = yaml.safe_dump({"training_config": sections})
        config_map = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "tuning"},
            "data": {"training_config.yaml": text},
        }
        path = folder / "workspace.yaml"
        path.write_text(yaml.safe_dump_all([workspace, config_map]))
        return path

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until that is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not after {seconds} s: {what()}"
        time.sleep(0.1)
    return found


class Server:
    """A Prefect server with the two deployments, whose runs nobody starts: their pool has no worker."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.log = (home / "log").open("wb")
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "prefect", "server", "start", "--port", str(self.port)],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": self.api},
            stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    def prepare(self) -> None:
        """Wait for the server, and make the deployments."""

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.api}/health", timeout=5).status_code == 200
            return False

        async def deploy() -> None:
            schema = parameter_schema(tune_workspace).model_dump()
            async with get_client() as client:
                await client.create_work_pool(WorkPoolCreate(name="kubernetes", type="process"))
                for name in ("tune-workspace", "serve-workspace"):
                    await client.create_deployment(
                        await client.create_flow_from_name(name),
                        name="kubernetes",
                        work_pool_name="kubernetes",
                        parameter_openapi_schema=schema,
                        enforce_parameter_schema=True,
                    )

        eventually(answers, 120)
        with temporary_settings({PREFECT_API_URL: self.api}):
            asyncio.run(deploy())

    def runs(self, namespace: str, name: str = "") -> list[dict[str, Any]]:
        """The runs of a namespace's Workspaces, or of one of them, the oldest first; no deletions."""
        found: list[dict[str, Any]] = []
        while True:
            page = {"limit": 200, "offset": len(found), "sort": "START_TIME_ASC"}
            answer = httpx.post(f"{self.api}/flow_runs/filter", json=page, timeout=60).json()
            found += answer
            if len(answer) < 200:
                break
        wanted = f"workspace:{namespace}/{name}"
        mine = [r for r in found if any(t == wanted if name else t.startswith(wanted) for t in r["tags"])]
        return sorted((r for r in mine if r["idempotency_key"]), key=lambda r: str(r["created"]))

    def set_state(self, run: dict[str, Any], type_: str, message: str = "") -> None:
        """Move a run as its worker would."""
        state = {"state": {"type": type_, "message": message}, "force": True}
        httpx.post(f"{self.api}/flow_runs/{run['id']}/set_state", json=state, timeout=60).raise_for_status()

    def deletions(self, namespace: str, name: str) -> list[str]:
        """The states of the runs of `delete-workspace`."""
        wanted = {
            "flows": {"name": {"any_": ["delete-workspace"]}},
            "flow_runs": {"name": {"any_": [f"delete-{namespace}-{name}"]}},
        }
        return [r["state_type"] for r in httpx.post(f"{self.api}/flow_runs/filter", json=wanted, timeout=60).json()]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server as a process of its own, with the deployments that the watcher starts."""
    server = Server(tmp_path_factory.mktemp("prefect") / "home")
    try:
        server.prepare()
        yield server
    finally:
        server.close()
