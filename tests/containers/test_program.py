"""What every program in a pod does, tried on a small program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.program import read_job
from kaito_flows.errors import InputError

PROGRAM = """
from __future__ import annotations
import errno, os, subprocess, sys
from dataclasses import dataclass
from typing import Any, Literal
from pathlib import Path
from kaito_flows.containers import program
from kaito_flows.containers.program import emit, run
from kaito_flows.errors import ConfigError

program.TERMINATION_LOG = Path(os.environ.get("TEST_TERMINATION_LOG", "/nowhere"))

@dataclass(frozen=True)
class Part:
    name: str
    size: int = 1

@dataclass(frozen=True)
class Job:
    version: Literal[1]
    do: str
    share: float
    part: Part | None
    names: tuple[str, ...]
    extra: dict[str, Any]
    flag: bool = False

def main(job: Job) -> dict[str, Any]:
    emit("stage", name=job.do)
    if job.do == "print":
        print("from Python")
        os.write(1, b"from C\\n")
        subprocess.run(["echo", "from a child"], check=True)
    elif job.do == "talk":
        return {"image": "oci:x", "history": ["ß" * 20] * 1000, "message": "m" * 3000}
    elif job.do == "complain":
        raise ConfigError("ß" * 10000, place="here", hint="do that")
    elif job.do == "refuse":
        raise ConfigError("two\\nlines", place="here", hint="do that") from ValueError("the cause")
    elif job.do == "crash":
        return {"x": [][1]}
    elif job.do == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif job.do == "exit":
        sys.exit(7)
    elif job.do == "many":
        for i in range(100000):
            emit("progress", step=i)
        open(job.names[0], "w").write("went on")
    return {"part": job.part.size if job.part else None, "share": job.share, "told": "grüße"}

run(main, Job, sys.argv)
"""
JOB: dict[str, Any] = {
    "version": 1, "do": "nothing", "share": 1, "part": {"name": "a"}, "names": ["x"], "extra": {"k": 1}
}  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def command(program: Path, job: object) -> list[str]:
    path = program.with_name("job.json")
    path.write_text(job if isinstance(job, str) else json.dumps(job))
    return [sys.executable, str(program), str(path)]


def run(program: Path, job: object) -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(command(program, job), capture_output=True, encoding="utf-8", timeout=60, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_job_that_ends_well_says_so_last_and_exits_with_0(program: Path) -> None:
    code, events, _ = run(program, JOB)
    assert code == 0
    assert events == [
        {"event": "stage", "name": "nothing"},
        {"event": "completed", "part": 1, "share": 1.0, "told": "grüße"},
    ]


def test_what_libraries_and_children_print_goes_to_standard_error(program: Path) -> None:
    code, events, stderr = run(program, {**JOB, "do": "print"})
    assert code == 0
    assert [e["event"] for e in events] == ["stage", "completed"]
    assert all(said in stderr for said in ("from Python", "from C", "from a child"))


def test_an_error_is_one_line_and_the_exit_code_of_its_class(program: Path) -> None:
    code, events, stderr = run(program, {**JOB, "do": "refuse"})
    assert code == 10
    said = {"code": "invalid-training-config", "place": "here", "message": "two lines", "hint": "do that"}
    assert events[-1] == {"event": "failed", **said}
    assert "ValueError: the cause" in stderr


@pytest.mark.parametrize("do", ["nothing", "refuse", "crash"])
def test_the_last_event_is_left_where_kubernetes_looks_for_it(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("TEST_TERMINATION_LOG", str(log))
    _, events, _ = run(program, {**JOB, "do": do})
    assert json.loads(log.read_bytes()) == events[-1]


@pytest.mark.parametrize("do", ["talk", "complain"])
def test_last_words_are_shortened_to_what_kubernetes_keeps(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: str
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("TEST_TERMINATION_LOG", str(log))
    _, events, _ = run(program, {**JOB, "do": do})
    kept = json.loads(log.read_bytes())
    assert len(log.read_bytes()) <= 4096
    assert kept["event"] == events[-1]["event"]
    if do == "talk":
        assert (kept["image"], kept["left_out"]) == ("oci:x", True)
    else:
        assert kept["message"].startswith("ßßß")
        assert (kept["code"], kept["hint"]) == ("invalid-training-config", "do that")


def test_a_termination_log_that_is_missing_or_cannot_be_written_changes_nothing(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "none", tmp_path):
        monkeypatch.setenv("TEST_TERMINATION_LOG", str(place))
        code, events, _ = run(program, JOB)
        assert (code, events[-1]["event"]) == (0, "completed")
    assert not (tmp_path / "none").exists()


def test_an_unknown_exception_is_a_failure_with_its_traceback_in_the_log(program: Path) -> None:
    code, events, stderr = run(program, {**JOB, "do": "crash"})
    assert code == 1
    assert events[-1]["code"] == "unexpected-error"
    assert "IndexError" in events[-1]["message"]
    assert "Traceback" in stderr


def test_a_full_disk_has_its_own_exit_code(program: Path) -> None:
    code, events, _ = run(program, {**JOB, "do": "full"})
    assert (code, events[-1]["code"]) == (15, "disk-full")


def test_standard_output_on_a_full_disk_is_told_by_the_exit_code(program: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(program, JOB), stdout=full, stderr=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 15


def test_the_work_goes_on_when_nobody_reads_the_events_any_more(program: Path, tmp_path: Path) -> None:
    end = tmp_path / "end"
    job = {**JOB, "do": "many", "names": [str(end)]}
    process = subprocess.Popen(command(program, job), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert end.read_text() == "went on"


@pytest.mark.parametrize(
    ("job", "place", "message"),
    [
        ("{", "job.json", "not JSON"),
        ("[1]", "job.json", "must be a mapping"),
        ({**JOB, "shares": 1}, "job.json", 'unknown key "shares"'),
        ({k: v for k, v in JOB.items() if k != "do"}, "job.json: do", "is required"),
        ({**JOB, "version": 2}, "job.json: version", "must be 1, not 2"),
        ({**JOB, "version": True}, "job.json: version", "must be 1, not true"),
        ({**JOB, "share": "1"}, "job.json: share", "must be a number"),
        ({**JOB, "share": True}, "job.json: share", "must be a number"),
        ({**JOB, "flag": 1}, "job.json: flag", "must be true or false"),
        ({**JOB, "part": {"name": 1}}, "job.json: part.name", "must be a text"),
        ({**JOB, "part": {"name": "a", "size": True}}, "job.json: part.size", "must be an integer"),
        ({**JOB, "part": {"name": "a", "sise": 1}}, "job.json: part", 'unknown key "sise"'),
        ({**JOB, "part": []}, "job.json: part", "must be a mapping"),
        ({**JOB, "names": "x"}, "job.json: names", "must be a list"),
        ({**JOB, "names": ["x", 2]}, "job.json: names[1]", "must be a text"),
        ({**JOB, "extra": []}, "job.json: extra", "must be a mapping"),
    ],
)
def test_a_job_file_is_read_strictly(program: Path, job: object, place: str, message: str) -> None:
    code, events, _ = run(program, job)
    assert code == 2
    assert events[-1]["place"].endswith(place)
    assert message in events[-1]["message"]


def test_an_unknown_key_names_the_one_that_was_meant(program: Path) -> None:
    _, events, _ = run(program, {**JOB, "shar": 1})
    assert events[-1]["hint"] == 'did you mean "share"?'


def test_a_null_is_taken_only_where_it_may_be(program: Path) -> None:
    code, events, _ = run(program, {**JOB, "part": None})
    assert (code, events[-1]["part"]) == (0, None)
    code, events, _ = run(program, {**JOB, "do": None})
    assert (code, events[-1]["place"].endswith("job.json: do")) == (2, True)


def test_a_missing_job_file_and_a_missing_argument_are_refused(program: Path) -> None:
    for arguments in ([str(program.with_name("none.json"))], [], ["a", "b"]):
        done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, timeout=60, check=False)
        assert done.returncode == 2
        assert json.loads(done.stdout)["code"] == "invalid-job"


def test_a_job_file_can_be_read_without_running_anything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_job(tmp_path / "none.json", dict)
