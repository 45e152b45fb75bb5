"""The tuner takes its dataset from a registry, and publishes there what it would publish in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image, extract, open_image, open_repository
from kaito_flows.oci.layout import Layout

from .conftest import IDENTITY, Root, Rows, make_config, make_dataset, make_root, run

pytestmark = pytest.mark.registry


@pytest.fixture
def root(registry: Any, models: dict[str, Path], rows: Rows, tmp_path: Path) -> Root:
    """A job whose dataset and output are in the registry."""
    extract(open_image(make_dataset(tmp_path / "layout", rows)), tmp_path / "files")
    files = {f"data/{path.name}": path for path in (tmp_path / "files/data").iterdir()}
    repository = f"docker://{registry.host}/team/tuner"
    credentials = Credentials.from_dockerconfig(registry.dockerconfig)
    dataset = build_image(open_repository(repository, credentials), [files], annotations={}, tag="dataset")
    assert dataset.digest == Layout(tmp_path / "layout").resolve("dataset")
    output = f"{repository}:run-{IDENTITY[:12]}"
    config = make_config("lora", "phi3", num_train_epochs=1.0)
    return make_root(tmp_path / "root", models["phi3"], dataset.reference, config, method="lora", output=output)


def test_the_adapter_in_the_registry_is_the_one_of_a_folder_and_is_made_once(
    registry: Any, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.config_folder))
    code, running = run(root)
    assert code == 0, (root.folder / "stderr.txt").read_text()
    first = running.events[-1]
    credentials = Credentials.from_dockerconfig(registry.dockerconfig)
    assert open_image(json.loads(root.job.read_text())["output"], credentials).digest == first["digest"]
    assert first["image"] == f"docker://{registry.host}/team/tuner@{first['digest']}"
    code, running = run(root)
    assert (code, running.events[-1]["reused"], running.events[-1]["digest"]) == (0, True, first["digest"])
    root.change_job(output=f"oci:{root.output}:run-{IDENTITY[:12]}")
    code, running = run(root)
    assert (code, running.events[-1]["reused"], running.events[-1]["digest"]) == (0, False, first["digest"])


def test_a_login_that_is_refused_ends_it_with_the_code_for_that(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    code, running = run(root)
    assert (code, running.events[-1]["code"]) == (19, "pull-refused")
    assert "no credentials in" in running.events[-1]["hint"]
