"""A training that is killed on one machine goes on from its checkpoint in the registry on another."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.containers.tuner.data import load_dataset, unpack
from kaito_flows.containers.tuner.image import IDENTITY as IDENTITY_KEY
from kaito_flows.containers.tuner.job import read_config
from kaito_flows.containers.tuner.model import adapt, load_base
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.shipping import STEP, Shipping
from kaito_flows.containers.tuner.training import train
from kaito_flows.errors import PreemptedError
from kaito_flows.oci.images import build_image, open_image, open_repository

from .conftest import IDENTITY, Root, Rows, Running, make_config, make_dataset, make_root, run, start

# What could make a resumed run differ: dropout, evaluations in between, a short last step.
HARD: dict[str, Any] = {
    "lora_dropout": 0.05, "eval_strategy": "steps", "eval_steps": 9, "save_steps": 1, "num_train_epochs": 6.0
}  # fmt: skip
TAG = f"checkpoint-{IDENTITY[:12]}"


@dataclass(frozen=True)
class Place:
    """What machines share: a registry (here a folder), with the dataset in it."""

    folder: Path
    models: dict[str, Path]
    dataset: str

    @property
    def checkpoints(self) -> str:
        return f"oci:{self.folder / 'registry'}:{TAG}"

    @property
    def tags(self) -> dict[str, str]:
        return open_repository(self.checkpoints).tags()

    def machine(self, name: str, **job: Any) -> Root:
        """A new root folder, with nothing in it but what the job needs."""
        config = make_config("qlora", "phi3", **HARD)
        output = f"oci:{self.folder / 'registry'}:run-{IDENTITY[:12]}"
        keys = {"checkpoints": self.checkpoints, "output": output, **job}
        return make_root(self.folder / name, self.models["phi3"], self.dataset, config, **keys)


@pytest.fixture
def place(tmp_path: Path, models: dict[str, Path], rows: Rows) -> Place:
    return Place(tmp_path, models, make_dataset(tmp_path / "data", rows))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Rows) -> str:
    """The digest of the adapter's image that an uninterrupted run without a registry for checkpoints makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Place(folder, models, make_dataset(folder / "data", rows))
    code, running = run(place.machine("root", checkpoints=None))
    assert code == 0, running.events
    digest: str = running.events[-1]["digest"]
    return digest


def pushed_steps(running: Running) -> list[int]:
    return [told["step"] for told in running.all("checkpoint-pushed")]


def test_after_sigterm_another_machine_ends_with_the_same_adapter(place: Place, undisturbed: str) -> None:
    first = start(place.machine("a", checkpoint_seconds=3600))
    first.wait_for("progress", 4)
    assert first.end(signal.SIGTERM) == 143
    stopped_at = first.all("checkpoint")[-1]["step"]
    # One is pushed in the hour, and the last one all the same.
    assert pushed_steps(first) == [1, stopped_at]
    assert first.events[-1]["event"] == "failed"
    shutil.rmtree(place.folder / "a")
    code, second = run(place.machine("b"))
    assert code == 0, second.events
    assert second.all("resumed") == [{"event": "resumed", "step": stopped_at}]
    assert second.events[-1]["digest"] == undisturbed


def test_after_kill_9_another_machine_goes_on_from_the_last_push(place: Place, undisturbed: str) -> None:
    first = start(place.machine("a"))
    first.wait_for("checkpoint-pushed", 3)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    pushed = int(open_image(place.checkpoints).annotations[STEP])
    assert pushed >= 3
    shutil.rmtree(place.folder / "a")
    code, second = run(place.machine("b"))
    assert code == 0, second.events
    assert second.all("resumed") == [{"event": "resumed", "step": pushed}]
    assert second.events[-1]["digest"] == undisturbed


def test_the_tag_is_gone_when_the_adapter_is_published(place: Place, undisturbed: str) -> None:
    code, running = run(place.machine("a"))
    assert code == 0
    assert 1 <= len(pushed_steps(running)) <= 29, "what comes after the last step is the adapter itself"
    assert running.events[-1]["digest"] == undisturbed
    assert set(place.tags) == {f"run-{IDENTITY[:12]}"}
    assert not (place.folder / "a/mnt/results/checkpoints").exists()


def test_a_newer_checkpoint_on_this_machine_is_gone_on_from(place: Place) -> None:
    first = start(place.machine("a", checkpoint_seconds=3600))
    first.wait_for("checkpoint", 4)
    first.end(signal.SIGKILL)
    local = max(int(name[-6:]) for name in Root(place.folder / "a", Path(), Path()).checkpoints if name[0] != ".")
    code, again = run(Root(place.folder / "a", place.folder / "a/job.json", place.folder / "registry"))
    assert code == 0
    assert again.all("resumed") == [{"event": "resumed", "step": local}]


@pytest.mark.parametrize("fault", ["none", "another's", "damaged", "no step", "no checkpoint in it"])
def test_a_checkpoint_that_is_damaged_or_anothers_is_passed_over(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    trained(place, tmp_path / "a", stop_after=3)
    path = tmp_path / "a/checkpoints/step-000003"
    files = {f"checkpoint/{path.name}": path.read_bytes() for path in path.iterdir()}
    annotations = {IDENTITY_KEY: IDENTITY, STEP: "3"}
    if fault == "another's":
        annotations[IDENTITY_KEY] = "ef" * 32
    elif fault == "damaged":
        name = "checkpoint/adapter.safetensors"
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    elif fault == "no step":
        annotations[STEP] = "soon"
    elif fault == "no checkpoint in it":
        files = {"data/README.md": b"#"}
    build_image(open_repository(place.checkpoints), [files], annotations=annotations, tag=TAG)
    capfd.readouterr()
    trained(place, tmp_path / "b", stop_after=4)
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    resumed_at = [told["step"] for told in events if told["event"] == "resumed"]
    assert resumed_at == ([3] if fault == "none" else [])


def trained(place: Place, results: Path, *, stop_after: int) -> None:
    """Train in this process, with SIGTERM after some steps."""

    class AfterSomeSteps(Preemption):
        @property
        def requested(self) -> bool:
            return (results / f"checkpoints/step-{stop_after:06d}").exists()

        @requested.setter
        def requested(self, value: bool) -> None: ...

    text = yaml.safe_dump({"training_config": make_config("qlora", "phi3", **HARD)})
    results.mkdir()
    (results / "config.yaml").write_text(text)
    config = read_config(results / "config.yaml", "qlora")
    unpack(open_image(place.dataset), results / "data")
    adapted = adapt(load_base(place.models["phi3"], config), "tests/tiny", config)
    dataset, shipping = load_dataset(results / "data"), Shipping(place.checkpoints, IDENTITY, 3600)
    shipping.offer = lambda saved, step: None  # type: ignore[method-assign]  # what is there is not written over
    with pytest.raises(PreemptedError, match=f"step {stop_after} of 30"):
        train(adapted, dataset, config, IDENTITY, results, AfterSomeSteps(), shipping=shipping)


def test_a_push_that_fails_is_told_and_training_goes_on(place: Place, undisturbed: str) -> None:
    code, running = run(place.machine("a", checkpoints="docker://127.0.0.1:9/tiny/adapter:checkpoint"))
    assert code == 20, "whether there is a checkpoint cannot be seen"
    (place.folder / "file").write_text("not a folder")
    code, running = run(place.machine("b", checkpoints=f"oci:{place.folder / 'file'}:checkpoint"))
    assert code == 0, running.events
    told = running.all("checkpoint-not-pushed")
    assert told and told[0]["step"] == 1
    assert told[0]["reason"]
    assert pushed_steps(running) == []
    assert running.events[-1]["digest"] == undisturbed


def test_checkpoints_go_through_a_real_registry(
    place: Place, registry: Any, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.config_folder))
    image = f"docker://{registry.host}/tiny/adapter:{TAG}"
    first = start(place.machine("a", checkpoints=image))
    first.wait_for("checkpoint-pushed", 1)
    assert first.end(signal.SIGTERM) == 143
    step = first.all("checkpoint")[-1]["step"]
    assert pushed_steps(first)[-1] == step
    assert first.all("checkpoint-pushed")[-1]["digest"] == open_image(image).digest
    code, second = run(place.machine("b", checkpoints=image))
    assert code == 0, second.events
    assert second.all("resumed") == [{"event": "resumed", "step": step}]
    assert second.events[-1]["digest"] == undisturbed
    assert TAG not in open_repository(image).tags()


def test_a_registry_that_says_no_is_told_and_training_goes_on(
    place: Place, registry: Any, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(place.folder))
    code, running = run(place.machine("a", checkpoints=f"docker://{registry.host}/tiny/adapter:{TAG}"))
    assert code == 0, running.events
    assert {told["code"] for told in running.all("checkpoint-not-pushed")} == {"push-refused"}
    assert running.events[-1]["digest"] == undisturbed


def saved(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        (path / name).write_bytes(f"{name} of {step}".encode())
    return path


def wait_for_tag(image: str) -> None:
    deadline = time.monotonic() + 20
    while "checkpoint" not in open_repository(image).tags():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_same_checkpoint_is_the_same_image_and_is_pushed_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", 7)
    digests = []
    for name in ("x", "y"):
        image = f"oci:{tmp_path / name}:checkpoint"
        shipping = Shipping(image, IDENTITY, 0)
        shipping.offer(path, 7)
        wait_for_tag(image)
        digests.append(open_image(image).digest)
        written = (tmp_path / name / "index.json").stat().st_mtime_ns
        shipping.finish(tmp_path / "a")
        assert (tmp_path / name / "index.json").stat().st_mtime_ns == written
    assert digests[0] == digests[1]
