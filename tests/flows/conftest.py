"""A Prefect server for the flows' tests, and a Workspace that is tuned in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")

MakeWorkspace = Callable[..., Path]


@pytest.fixture(scope="module")
def prefect_server() -> Iterator[None]:
    """A Prefect server of the tests' own; without heartbeats, whose thread makes each flow a second longer."""
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
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
