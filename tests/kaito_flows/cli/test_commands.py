"""The commands as a user types them: what they print, for people and as JSON, and how they end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_flows import __version__
from kaito_flows.cli.app import _quiet_prefect

MakeWorkspace = Callable[..., Path]
CONDITIONS = ("ResourceReady", "JobStarted", "InferenceReady", "WorkspaceSucceeded")


def test_version_is_one_line(command: Any) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_help_names_every_command_in_a_line_that_is_not_cut(command: Any) -> None:
    done = command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("validate", "plan", "tune", "status", "chat", "delete", "nodes"):
        assert re.search(rf"^  {name} +\S.*\.$", done.stdout, re.MULTILINE), name
    assert "..." not in done.stdout.partition("Commands:")[2]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_without_a_command_the_help_is_shown_as_a_mistake(command: Any) -> None:
    done = command()
    assert done.returncode == 2
    assert done.stdout == command("--help").stdout


@pytest.mark.parametrize("name", ["plan", "delete"])
def test_each_command_explains_itself(command: Any, name: str) -> None:
    done = command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["validate", "FILE"], ["validate", "FILE", "--json"], ["plan", "FILE"]]
)
def test_what_answers_at_once_imports_neither_torch_nor_prefect(
    command: Any, make_workspace: MakeWorkspace, arguments: list[str]
) -> None:
    given = [str(make_workspace()) if a == "FILE" else a for a in arguments]
    program = """
import atexit, sys
atexit.register(lambda: print("\\nIMPORTED", *sys.modules))
from kaito_flows.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True, check=True)
    imported = set(done.stdout.rpartition("\nIMPORTED ")[2].split())
    assert "kaito_flows.cli.app" in imported
    assert not imported & {"torch", "transformers", "prefect", "pyarrow", "httpx", "fastapi"}


def test_validate_says_valid(command: Any, make_workspace: MakeWorkspace) -> None:
    path = make_workspace()
    done = command("validate", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: Workspace tiny (kaito.sh/v1beta1) is valid\n"
    assert command.facts("validate", path) == {
        "valid": True, "name": "tiny", "kind": "kaito.sh/v1beta1", "warnings": [],
    }  # fmt: skip
    assert not command.home.exists()


def test_plan_says_what_it_takes_and_starts_nothing(command: Any, make_workspace: MakeWorkspace) -> None:
    path = make_workspace()
    done = command("plan", path)
    assert done.returncode == 0
    assert done.stdout.startswith("Plan of tiny\n")
    for item in ("model", "memory", "device", "price", "sizes that fit"):
        assert re.search(rf"^  {item}  +\S", done.stdout, re.MULTILINE), item
    facts = command.facts("plan", path)
    assert facts["workspace"] == "tiny"
    assert not command.home.exists()


def test_plan_of_a_service_says_what_it_takes_while_it_serves(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(
        """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: serving}
resource: {instanceType: Standard_NC24ads_A100_v4, labelSelector: {matchLabels: {a: b}}}
inference:
  preset: {name: phi-3-mini-4k-instruct}
  adapters: [{source: {name: glosses, image: r.io/glosses:1}, strength: "0.5"}]
"""
    )
    done = command("plan", path)
    assert done.returncode == 0
    assert done.stdout.startswith("Plan of serving\n")
    assert re.search(r"^  length  +4,096 tokens", done.stdout, re.MULTILINE)
    assert re.search(r"^  price  +3\.67 USD/h .*, for as long as it serves$", done.stdout, re.MULTILINE)
    assert command.facts("plan", path)["adapters"] == ["glosses"]
    done = command("plan", path, "--data")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a service has no data to prepare" in done.stderr


def test_print_parameters_gives_what_a_deployment_takes(command: Any, make_workspace: MakeWorkspace) -> None:
    done = command("tune", make_workspace(), "--print-parameters", "--no-serve", "--port", "5123")
    assert (done.returncode, done.stderr) == (0, "")
    parameters = json.loads(done.stdout)
    assert set(parameters) == {"workspace", "training_config", "serve", "port"}
    assert (parameters["serve"], parameters["port"]) == (False, 5123)
    assert parameters["workspace"]["tuning"]["input"]["urls"][0].startswith("file:///")
    assert not command.home.exists()


def test_status_of_a_machine_that_knows_nothing(command: Any) -> None:
    done = command("status")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no Workspaces on this machine\n", "")
    assert command.facts("status") == []
    assert not command.home.exists()


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("status", "../.."),
        ("chat", "../.."),
        *(("delete", name) for name in ("nobody", "..", "", "../jobs/other", "/")),
    ],
)
def test_a_name_that_no_workspace_has_touches_nothing(command: Any, verb: str, name: str) -> None:
    kept = [command.home / "jobs/other/tune/job.json", command.home / "workspaces/kept", command.home.parent / "mine"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (command.home / "services/other").mkdir(parents=True)
    done = command(verb, name, *(["hello"] if verb == "chat" else []))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: (workspace|service)-not-found: .*\(kaito-flows .*\)\n", done.stderr)
    assert all(path.exists() for path in kept)
    assert (command.home / "services/other").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["tune"],
        ["tune", "x", "--port", "99999"],
        ["validate", "x", "--frob"],
        ["validate", "x", "--frob", "--json"],
        ["plan", "x", "--platform", "moon"],
        ["chat", "x", "--json"],
    ],
)
def test_a_command_that_is_mistyped_is_one_line(command: Any, arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    if "--json" in arguments:
        assert done.stderr == ""
        assert set(json.loads(done.stdout)["error"]) >= {"code", "place", "message", "hint"}
    else:
        assert re.fullmatch(r"error: (usage|invalid-input): .*\(.*\)\n", done.stderr)


def test_tune_in_a_pipe_prints_plain_lines_and_what_came_of_it(tuned: Any) -> None:
    output = tuned.output
    assert "\x1b" not in output
    assert "\r" not in output
    assert re.search(r"^tune +step 8/8 +loss \d+\.\d{3} +\d+ tokens/s +\d+:\d\d left$", output, re.MULTILINE)
    for stage in ("plan", "check access", "fetch weights", "prepare dataset", "tune", "publish", "roll out"):
        assert re.search(rf"^{stage} +done in \d+\.\d s$", output, re.MULTILINE), stage

    assert "check nodes" not in output, "there are none to be rented"
    end = output.partition("\n\n")[2]
    assert "cost" not in end
    layout = tuned.command.home / "registry/localhost/test/tiny"
    assert f"adapter  oci:{layout}:latest\n" in end
    digest = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert re.search(r"^digest   (sha256:[0-9a-f]{64})$", end, re.MULTILINE)[1] in {d["digest"] for d in digest}  # type: ignore[index]
    before, after = map(float, re.search(r"held out loss (\S+) before, (\S+) after", end).groups())  # type: ignore[union-attr]
    assert after < before
    for label in ("prompt", "  base", "  tuned", "  data"):
        assert re.search(rf"^{label} +\S", end, re.MULTILINE), label
    assert re.search(r"^chat     \S*kaito-flows chat tiny '?Say .*'?$", end, re.MULTILINE)
    assert re.search(r"^stop     \S*kaito-flows delete tiny$", end, re.MULTILINE)
    server = tuned.command.environment["PREFECT_API_URL"].removesuffix("/api")
    assert re.search(rf"^  {server}/runs/flow-run/[0-9a-f-]{{36}}$", end, re.MULTILINE)
    assert re.search(r"^time     plan \d+\.\d s, .*tune \d+\.\d s, .*roll out \d+\.\d s$", end, re.MULTILINE)


def test_what_tune_prints_of_chatting_can_be_typed(tuned: Any) -> None:
    typed = re.search(r"^chat     \S+ (.*)$", tuned.output, re.MULTILINE)
    assert typed
    done = tuned.command(*shlex.split(typed[1]))
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    curl = re.search(r"^or       (curl .*\\\n.*)$", tuned.output, re.MULTILINE)
    assert curl
    answered = subprocess.run(["/bin/sh", "-c", curl[1]], capture_output=True, text=True, timeout=60, check=True)
    assert isinstance(json.loads(answered.stdout)["Result"], str)


def test_a_second_tune_says_that_nothing_was_to_be_trained_and_fits_a_terminal(tuned: Any) -> None:
    shown = tuned.command.on_terminal("tune", tuned.file)
    assert shown.exit_code == 0
    assert "nothing to train: an adapter with the same inputs was there already" in shown.lines
    assert not [line for line in shown.lines if re.search(r"step \d|tok/s|make weights", line)]
    to_be_copied = ("chat ", "or ", "           -d", "stop ", "adapter ")
    assert [line for line in shown.lines if len(line) > 80 and not line.startswith(to_be_copied)] == []


def test_the_next_plan_of_its_kind_counts_with_the_memory_that_it_took(tuned: Any, command: Any) -> None:
    planned = tuned.command.facts("plan", tuned.file)
    assert planned["memory_measured"] != 1.0
    lines = tuned.command.on_terminal("plan", tuned.file).lines
    [shown] = [line for line in lines if line.startswith("  memory ")]
    assert re.search(r"about \d\.\d\d GiB, as measured \(\d+% of the estimate\)$", shown)
    assert max(map(len, lines)) <= 80
    assert command.facts("plan", tuned.file)["memory_measured"] == 1.0, "without a server nothing is known"


def test_status_shows_the_columns_the_conditions_and_the_service(tuned: Any) -> None:
    [facts] = tuned.command.facts("status", "tiny")
    assert facts["state"] == "Succeeded"
    assert {name: facts["conditions"][name]["status"] for name in CONDITIONS} == dict.fromkeys(CONDITIONS, "True")
    assert httpx.get(f"{facts['service_url']}/health", timeout=10).status_code == 200
    header, row = tuned.command("status").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "INSTANCE", "RESOURCEREADY", "INFERENCEREADY"]
    assert row.split()[0] == "tiny"
    shown = tuned.command("status", "tiny").stdout
    assert "cost" not in shown, "this machine is not paid for"
    assert re.search(rf"^  service +{facts['service_url']}$", shown, re.MULTILINE)
    for name in CONDITIONS:
        assert re.search(rf"^  {name} +True", shown, re.MULTILINE)
    narrow = tuned.command.on_terminal("status", "tiny")
    assert max(map(len, narrow.lines)) <= 80
    assert "tiny" in narrow.lines
    assert any(re.fullmatch(" +STATE +Succeeded", line) for line in narrow.lines)


def test_chat_answers_from_the_adapter_and_from_the_base(tuned: Any) -> None:
    facts = tuned.command.facts("chat", "tiny", "Say red 0.", "--max-tokens", "8")
    assert set(facts) == {"model", "prompt", "answer", "url"}
    assert (facts["model"], facts["prompt"]) == ("tiny", "Say red 0.")
    base = tuned.command.facts("chat", "tiny", "Say red 0.", "--base", "--max-tokens", "8")
    assert base["model"] == "tiny-phi-3"
    assert base["answer"] != facts["answer"]
    done = tuned.command("chat", "tiny", "--base", "--max-tokens", "8", "--system", "Be brief.", "Say red 0.")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_a_conversation_ends_with_an_empty_line_or_with_the_input(tuned: Any) -> None:
    for said in ("Say red 0.\n\nSay red 1.\n", "Say red 0.\n"):
        done = tuned.command("chat", "tiny", "--base", "--max-tokens", "4", stdin=said)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("tiny-phi-3 at http://127.0.0.1:")
        assert done.stdout.count("you:") == 2


def test_delete_ends_the_service_and_forgets_but_keeps_the_image(tuned: Any, tmp_path: Path) -> None:
    # Another name with the same inputs and the same repository: no training, a service of its own.
    file = tmp_path / "other.yaml"
    file.write_text(tuned.file.read_text().replace("name: tiny\n", "name: other\n"))
    (tmp_path / "chats.parquet").symlink_to(tuned.file.with_name("chats.parquet"))
    facts = tuned.command.facts("tune", file)
    assert (facts["workspace"], facts["reused"]) == ("other", True)
    url = facts["service"]["url"]
    assert httpx.get(f"{url}/health", timeout=10).status_code == 200

    deleted = tuned.command.facts("delete", "other")
    assert deleted["deleted"] == "other"
    assert [stopped.split()[0] for stopped in deleted["stopped"]] == ["service"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=10)
    for verb in ("status", "delete"):
        done = tuned.command(verb, "other")
        assert done.returncode == 2
        assert done.stderr.startswith("error: workspace-not-found: 'other': ")
    home = tuned.command.home
    assert not [folder for folder in ("jobs", "services", "workspaces") if list((home / folder).glob("other*"))]
    assert [status["name"] for status in tuned.command.facts("status")] == ["tiny"]
    assert "latest" in (home / "registry/localhost/test/tiny/index.json").read_text()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tuned: Any) -> Iterator[tuple[Any, Any, Path]]:
    """A run on a terminal that got Ctrl-C in mid-training: the command, what the terminal showed, the file."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("started in the background, where SIGINT is ignored; .ci/run sees to it that it is not")
    command = type(tuned.command)(tmp_path_factory.mktemp("interrupted") / "home", tuned.command.environment)
    file = command.home.parent / "files/long.yaml"
    file.parent.mkdir()
    (file.parent / "chats.parquet").symlink_to(tuned.file.with_name("chats.parquet"))
    text = tuned.file.read_text().replace("name: tiny\n", "name: long\n").replace("max_steps: 8", "max_steps: 900")
    file.write_text(text)
    yield command, command.on_terminal("tune", file, "--no-serve", interrupt_at=r" [1-9]\d*/900 "), file
    command.end_all()


def test_on_a_terminal_training_is_a_bar_that_fits(interrupted: Any) -> None:
    _, shown, _ = interrupted
    bars = [line for line in shown.lines if "tok/s" in line]
    assert bars
    whole = re.compile(r"tune \S+ +\d+/900 loss \d+\.\d{3} +\d+ tok/s \d+:\d\d left *")
    assert [bar for bar in bars if not whole.fullmatch(bar)] == []
    assert max(map(len, bars)) <= 78, "room for the ^C that the terminal echoes"
    assert [line for line in shown.lines if len(line) > 80] == []


def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(interrupted: Any) -> None:
    command, shown, _ = interrupted
    assert shown.exit_code == 130
    assert shown.lines[-1] == "warning: interrupted; run it again to go on from the last checkpoint"
    assert "Traceback" not in shown.raw
    assert command.processes() == []
    assert command.facts("status", "long")[0]["state"] in ("Stopped", "Succeeded")


def test_after_ctrl_c_the_next_tune_goes_on_from_the_checkpoint(interrupted: Any) -> None:
    command, _, file = interrupted
    assert command.facts("status", "long")[0]["state"] == "Stopped"
    done = command("tune", file, "--no-serve")
    assert (done.returncode, done.stderr) == (0, "")
    resumed = re.search(r"^tune +going on from the checkpoint at step (\d+)$", done.stdout, re.MULTILINE)
    assert resumed
    assert 0 < int(resumed[1]) < 900
    assert re.search(r"^tune +step 900/900 ", done.stdout, re.MULTILINE)
    assert "chat " not in done.stdout
    assert command.processes() == []


def test_a_run_in_a_terminal_gives_the_signs_of_life_that_the_automations_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kaito_flows.flows.automations import HEARTBEAT

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environment := {})
        _quiet_prefect()
    assert float(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == HEARTBEAT.total_seconds()
