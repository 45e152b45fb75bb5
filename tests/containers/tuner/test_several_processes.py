"""Several processes, on one machine and on two, train the adapter that one trains, and fail and stop as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from kaito_flows.containers.program import read_job
from kaito_flows.containers.tuner.job import Model, TunerJob, WorldConfig
from kaito_flows.containers.tuner.launch import NODE_RANK, meeting_place
from kaito_flows.errors import InputError

from .conftest import IDENTITY, Root, Rows, Running, make_config, make_dataset, make_root, run, start

TOLERANCE = 1e-4
"""Relative, of losses: sums are made in another order. What was seen is below 1e-6."""

# Accumulation, a last step of an epoch with fewer rows, evaluations in between; no dropout, of which each process has
# its own masks.
SETTINGS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 1, "logging_steps": 1}


def world(processes: int, nodes: int = 1, port: int = 0) -> dict[str, Any]:
    return {"nodes": nodes, "processes": processes, "rendezvous": f"127.0.0.1:{port}" if port else None}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Place:
    """What machines share: a registry (here a folder), with the dataset in it."""

    folder: Path
    models: dict[str, Path]
    dataset: str

    def machine(self, name: str, *, method: str = "qlora", changed: dict[str, Any] | None = None, **job: Any) -> Root:
        config = make_config(method, "phi3", **{**SETTINGS, **(changed or {})})
        output = f"oci:{self.folder / 'registry'}:run-{name[0]}"
        return make_root(
            self.folder / name, self.models["phi3"], self.dataset, config, method=method, **{"output": output, **job}
        )


ASKED = {
    "samples.json": json.dumps([{"messages": [{"role": "user", "content": "t100 t50"}], "answer": "t9 t9"}]).encode()
}


@pytest.fixture
def place(tmp_path: Path, models: dict[str, Path], rows: Rows) -> Place:
    # 19 rows: four a step, and three in an epoch's last.
    rows = {**rows, "train": {name: array[:19] for name, array in rows["train"].items()}}
    return Place(tmp_path, models, make_dataset(tmp_path / "data", rows, **ASKED))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], rows: Rows) -> dict[str, Running]:
    """What one process says, by method."""
    ended = {}
    for method in ("qlora", "lora"):
        folder = tmp_path_factory.mktemp(f"alone-{method}")
        fewer = {**rows, "train": {name: array[:19] for name, array in rows["train"].items()}}
        place = Place(folder, models, make_dataset(folder / "data", fewer, **ASKED))
        root = place.machine("root", method=method)
        code, ended[method] = run(root)
        assert code == 0, ended[method].events
        ended[method].events[-1]["root"] = str(root.results)
    return ended


def curve(running: Running) -> dict[str, list[float]]:
    return {
        "losses": [told["loss"] for told in running.all("progress")],
        "norms": [told["grad_norm"] for told in running.all("progress")],
        "held out": [told["loss"] for told in running.all("evaluation")],
    }


def furthest(one: Running, other: Running) -> float:
    """The largest relative difference between the losses that the two say."""
    ours, theirs = curve(one), curve(other)
    assert {name: len(values) for name, values in ours.items()} == {
        name: len(values) for name, values in theirs.items()
    }
    return max(
        abs(a - b) / abs(b) for name in ("losses", "held out") for a, b in zip(ours[name], theirs[name], strict=True)
    )


def counts(running: Running) -> dict[str, Any]:
    facts: dict[str, Any] = running.events[-1]["metrics"]["training"]
    return {name: facts[name] for name in ("steps", "epochs", "tokens", "trained_tokens")}


def stderr(root: Root) -> str:
    return (root.folder / "stderr.txt").read_text()


def test_two_processes_have_the_loss_curve_of_one(place: Place, alone: dict[str, Running]) -> None:
    root = place.machine("a", world=world(2))
    code, running = run(root)
    assert code == 0, stderr(root)
    assert furthest(running, alone["qlora"]) < TOLERANCE
    assert counts(running) == counts(alone["qlora"])
    # Process 0 alone speaks, writes and publishes.
    assert [told["event"] for told in running.events if told["event"] != "checkpoint"] == [
        told["event"] for told in alone["qlora"].events if told["event"] != "checkpoint"
    ]
    history = [json.loads(line) for line in (root.results / "history.jsonl").read_text().splitlines()]
    assert [told["step"] for told in history if told["event"] == "progress"] == list(range(1, 11))
    adapter = load_file(root.results / "adapter_model.safetensors")
    assert len(adapter) == 16 and all(bool(tensor.any()) for tensor in adapter.values())


def test_a_training_that_went_well_ends_well_whatever_the_libraries_do_at_exit(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = "import atexit, os, sys\nif 'kaito_flows.containers.tuner' in sys.orig_argv: atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    root = place.machine("a", world=world(2))
    code, running = run(root)
    assert (code, running.events[-1]["event"]) == (0, "completed"), stderr(root)


def test_two_machines_have_the_loss_curve_of_one_process(place: Place, alone: dict[str, Running]) -> None:
    port = free_port()
    roots = [place.machine(name, world=world(1, nodes=2, port=port)) for name in ("a1", "a2")]
    both = [start(root) for root in roots]
    assert [running.end() for running in both] == [0, 0], "\n".join(map(stderr, roots))
    # One of them speaks; both know what it came to.
    [speaker] = [running for running in both if running.all("progress")]
    assert furthest(speaker, alone["qlora"]) < TOLERANCE
    assert both[0].events[-1] == both[1].events[-1]
    assert counts(speaker) == counts(alone["qlora"])
    assert [(root.results / "adapter_model.safetensors").exists() for root in roots].count(True) == 1


def test_more_processes_than_rows_in_a_step_have_the_same_loss_curve(place: Place, alone: dict[str, Running]) -> None:
    root = place.machine("a", world=world(4))
    code, running = run(root)
    assert code == 0, stderr(root)
    assert furthest(running, alone["qlora"]) < TOLERANCE


CHUNKS = """
import sys
if "kaito_flows.containers.tuner" in sys.orig_argv:
    from kaito_flows.containers.tuner import loss
    loss.CHUNK, loss.LOGITS = 7, 256
"""


@pytest.mark.parametrize("customized", ["", CHUNKS], ids=["logits at once", "logits in chunks"])
def test_a_base_model_divided_among_processes_has_the_same_loss_curve(
    customized: str, place: Place, alone: dict[str, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(customized)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    # One row at a time: in an epoch's last step, one process has more to do than the other.
    changed = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    root = place.machine("a", method="lora", changed=changed, world=world(2), shard=True)
    code, running = run(root)
    assert code == 0, stderr(root)
    assert furthest(running, alone["lora"]) < TOLERANCE
    assert counts(running) == counts(alone["lora"])
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (root.results, Path(alone["lora"].events[-1]["root"]))
    ]
    assert shapes[0] == shapes[1]
    [[answered], [theirs]] = (told[0]["samples"] for told in (running.all("samples"), alone["lora"].all("samples")))
    assert (answered["messages"], answered["base"]) == (theirs["messages"], theirs["base"])
    assert answered["tuned"] != answered["base"]


def test_sigterm_stops_all_after_the_same_step_and_another_number_of_processes_goes_on(
    place: Place, alone: dict[str, Running]
) -> None:
    checkpoints = f"oci:{place.folder / 'registry'}:checkpoint"
    first = start(place.machine("a", world=world(2), checkpoints=checkpoints, checkpoint_seconds=3600))
    first.wait_for("progress", 3)
    assert first.end(signal.SIGTERM) == 143, stderr(Root(place.folder / "a", Path(), Path()))
    failed = first.events[-1]
    assert (failed["event"], failed["code"]) == ("failed", "preempted")
    step = first.all("checkpoint")[-1]["step"]
    assert f"step {step} of 10" in failed["message"]
    assert first.all("checkpoint-pushed")[-1]["step"] == step
    # On another machine, with one process.
    root = place.machine("b", checkpoints=checkpoints)
    code, second = run(root)
    assert code == 0, stderr(root)
    assert second.all("resumed") == [{"event": "resumed", "step": step}]
    whole = Running(second.process, [*first.events, *second.events])
    losses = {told["step"]: told["loss"] for told in whole.all("progress")}
    expected = [told["loss"] for told in alone["qlora"].all("progress")]
    assert [losses[step] for step in range(1, 11)] == pytest.approx(expected, rel=TOLERANCE)


def test_sigterm_on_one_machine_stops_both(place: Place) -> None:
    port = free_port()
    roots = [place.machine(name, world=world(1, nodes=2, port=port)) for name in ("a1", "a2")]
    both = [start(root) for root in roots]
    reached = next(running for running in _racing(both))
    other = next(running for running in both if running is not reached)
    assert other.end(signal.SIGTERM) == 143, stderr(roots[1])
    assert reached.end() == 143
    assert {running.events[-1]["code"] for running in both} == {"preempted"}
    saved = [name for root in roots for name in root.checkpoints]
    assert saved and saved[-1] == f"step-{reached.all('checkpoint')[-1]['step']:06d}"


def _racing(both: list[Running]) -> Any:
    """Yield the machine whose process speaks, when it has made a step."""
    import select

    outs = {running.process.stdout: running for running in both}
    while True:
        ready, _, _ = select.select(list(outs), [], [], 90)
        assert ready, [running.events for running in both]
        for out in ready:
            running = outs[out]
            assert out is not None
            line = out.readline()
            assert line, running.events
            running.events.append(json.loads(line))
            if running.events[-1]["event"] == "progress":
                yield running


def test_a_process_that_is_killed_ends_all_and_the_job_goes_on_when_it_is_started_again(
    place: Place, alone: dict[str, Running]
) -> None:
    root = place.machine("a", world=world(2))
    running = start(root)
    running.wait_for("checkpoint", 3)
    victim = psutil.Process(running.process.pid).children()[-1]
    victim.kill()
    assert running.end() == 137, stderr(root)
    failed = running.events[-1]
    assert failed["event"] == "failed"
    assert failed["code"] in ("job-killed", "peer-lost")
    code, again = run(root)
    assert code == 0, stderr(root)
    [resumed] = again.all("resumed")
    assert resumed["step"] >= 3
    assert again.all("evaluation")[-1]["loss"] == pytest.approx(
        alone["qlora"].all("evaluation")[-1]["loss"], rel=TOLERANCE
    )


@pytest.mark.parametrize(
    ("method", "changed", "job", "code", "said"),
    [
        ("qlora", {"target_modules": ["no_such_proj"]}, {}, 10, "invalid-training-config"),
        ("lora", {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}, {}, 14, "diverged"),
    ],
)
def test_what_a_process_fails_with_is_what_the_program_fails_with(
    place: Place, method: str, changed: dict[str, Any], job: dict[str, Any], code: int, said: str
) -> None:
    root = place.machine("a", method=method, changed=changed, world=world(2), **job)
    ended, running = run(root)
    assert (ended, running.events[-1]["code"]) == (code, said), stderr(root)
    assert running.events[-1]["hint"]
    assert len(running.all("failed")) == 1
    assert running.all("worker-failed") == []


def test_a_world_of_one_process_starts_no_other(place: Place, alone: dict[str, Running]) -> None:
    root = place.machine("a", world=world(1))
    code, running = run(root)
    assert code == 0
    assert curve(running) == curve(alone["qlora"])
    assert "elastic" not in stderr(root)


@pytest.mark.parametrize(
    ("value", "at"),
    [
        ({"nodes": 0, "processes": 1}, "world.nodes"),
        ({"nodes": 1, "processes": 0}, "world.processes"),
        ({"nodes": 2, "processes": 1}, "world.rendezvous"),
        ({"nodes": 2, "processes": 1, "rendezvous": "tuner-0"}, "world.rendezvous"),
        ({"nodes": 2}, "world.processes"),
    ],
)
def test_a_world_that_cannot_be_is_refused(place: Place, value: dict[str, Any], at: str) -> None:
    with pytest.raises(InputError) as caught:
        read_job(place.machine("a", world=value).job, TunerJob)
    assert caught.value.place.endswith(at)


def test_a_base_model_in_four_bits_is_not_divided(place: Place) -> None:
    with pytest.raises(InputError, match="4 bits") as caught:
        read_job(place.machine("a", world=world(2), shard=True).job, TunerJob)
    assert (caught.value.code, caught.value.job_exit_code) == ("shard-unsupported", 2)


def test_published_before_no_process_is_started(place: Place) -> None:
    root = place.machine("a")
    code, first = run(root)
    assert code == 0
    root.change_job(world=world(2))
    code, again = run(root)
    assert code == 0
    assert [told["event"] for told in again.events] == ["completed"]
    assert again.events[-1]["digest"] == first.events[-1]["digest"]
    assert (first.events[-1]["reused"], again.events[-1]["reused"]) == (False, True)


def test_a_machine_with_a_number_serves_the_meeting_place_or_waits_for_who_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    place = WorldConfig(2, 1, f"localhost:{port}")
    model = Model("phi", "p/phi", "r1")
    job = TunerJob(1, "w", IDENTITY, tmp_path, "lora", model, "oci:/d:a", "oci:/o:a", world=place)
    assert meeting_place(job) == (f"localhost:{port}", {}), "who has no number is found by its address"
    monkeypatch.setenv(NODE_RANK, "0")
    assert meeting_place(job) == (f"127.0.0.1:{port}", {"is_host": True}), "its name may lead nowhere yet"
    monkeypatch.setenv(NODE_RANK, "1")
    begun = time.monotonic()
    opening = threading.Timer(1.5, lambda: listeners.append(socket.create_server(("127.0.0.1", port))))
    listeners: list[socket.socket] = []
    opening.start()
    assert meeting_place(job) == (f"localhost:{port}", {"is_host": False})
    assert time.monotonic() - begun > 1.4
    listeners[0].close()
