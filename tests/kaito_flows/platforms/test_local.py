"""This machine as a platform: jobs are adopted, errors come back as what they were, services roll over."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_flows.errors import (
    ConfigError,
    InputError,
    JobError,
    KaitoFlowsError,
    KilledError,
    OutOfMemoryError,
    PortTakenError,
    RunError,
    ServiceError,
)
from kaito_flows.platforms import JobSpec, LocalPlatform, Service, ServiceSpec, Weights, local
from kaito_flows.platforms.processes import Process
from kaito_flows.settings import Settings
from kaito_flows.workspace.status import INFERENCE_READY, WorkspaceStatus

# A job that does what its arguments say; a service that answers /health as the real one does.
PROGRAM = """
import json, os, pathlib, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
job = json.load(open(sys.argv[1]))
def emit(**event): print(json.dumps(event), flush=True)
if "port" in job:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
        def log_message(self, *_): pass
    if job.get("fail"): sys.exit("no model")
    HTTPServer.allow_reuse_address = True
    try: server = HTTPServer((job["host"], job["port"]), Health)
    except OSError: emit(event="failed", code="port-taken", place="", message="taken", hint=""); sys.exit(18)
    emit(event="serving", host=job["host"], port=job["port"], models=["base", job["workspace"]])
    server.serve_forever()
with open(pathlib.Path(job["root"]) / "starts", "a") as out: out.write("x")
for step in range(job.get("steps", 1)):
    emit(event="progress", step=step + 1); time.sleep(job.get("pause", 0))
if job.get("wait_for"):
    while not os.path.exists(job["wait_for"]): time.sleep(0.05)
if "failed" in job:
    emit(event="failed", code="a-code", place="a place", message="a message", hint="a hint"); sys.exit(job["failed"])
if "silent" in job:
    print("Traceback: boom", file=sys.stderr); sys.exit(job["silent"])
emit(event="completed", answer=42)
"""


@pytest.fixture
def platform(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> LocalPlatform:
    (tmp_path / "fixture_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(local, "_module", lambda spec: spec.program)
    return LocalPlatform(Settings())


def job(**arguments: Any) -> JobSpec:
    return JobSpec("j", "w", "fixture_program", arguments)


def status(name: str) -> WorkspaceStatus:
    return WorkspaceStatus(name, "kaito.sh/v1beta1", "")


def run(platform: LocalPlatform, spec: JobSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return platform.run_job(spec, events.append), events


def starts(platform: LocalPlatform) -> int:
    return len((platform.home / "jobs/w/j/starts").read_text())


def test_a_job_returns_what_it_completed_with(platform: LocalPlatform) -> None:
    outcome, events = run(platform, job(steps=2))
    assert outcome["answer"] == 42
    assert [e["event"] for e in events] == ["progress", "progress", "completed"]


def test_files_and_weights_lie_under_its_root_before_it_starts(platform: LocalPlatform) -> None:
    weights = Weights("tiny", {"kind": "random", "seed": 0}, 10)
    spec = JobSpec("j", "w", "fixture_program", {}, {"mnt/config/c.yaml": "a: 1"}, weights)
    run(platform, spec)
    root = platform.home / "jobs/w/j"
    assert (root / "mnt/config/c.yaml").read_text() == "a: 1"
    folder = (root / "workspace/weights").readlink()
    assert folder.parent.parent.parent == platform.home / "models"
    assert folder.parent.parent.name.startswith("tiny-")


def test_a_job_that_ended_well_is_not_run_again(platform: LocalPlatform) -> None:
    run(platform, job())
    outcome, _ = run(platform, job())
    assert outcome["answer"] == 42
    assert starts(platform) == 1


def test_a_job_that_still_runs_is_followed_and_not_started_twice(platform: LocalPlatform, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    outcomes = []

    def follow(thought: int) -> None:
        # What is thought of its memory makes it no other job.
        spec = replace(job(wait_for=str(gate)), memory={"needed": thought, "kept_block": 1})
        outcomes.append(run(platform, spec)[0])

    threads = [threading.Thread(target=follow, args=(thought,)) for thought in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    gate.touch()
    for thread in threads:
        thread.join()
    assert [o["answer"] for o in outcomes] == [42, 42, 42]
    assert starts(platform) == 1


def test_who_follows_a_job_that_another_run_cleared_away_has_its_outcome(platform: LocalPlatform) -> None:
    spec, outcomes = job(steps=3, pause=0.2), []

    def follow() -> None:
        outcomes.append(run(platform, spec)[0])
        platform.forget_job(spec)

    threads = [threading.Thread(target=follow) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [o["answer"] for o in outcomes] == [42, 42]
    assert not (platform.home / "jobs/w/j").exists()


def test_a_job_with_other_arguments_replaces_the_one_that_runs(platform: LocalPlatform, tmp_path: Path) -> None:
    errors: list[KaitoFlowsError] = []

    def first() -> None:
        try:
            run(platform, job(wait_for=str(tmp_path / "never")))
        except KaitoFlowsError as exc:
            errors.append(exc)

    thread = threading.Thread(target=first)
    thread.start()
    while not (platform.home / "jobs/w/j/starts").exists():
        time.sleep(0.05)
    assert run(platform, job(steps=1))[0]["answer"] == 42
    thread.join(timeout=10)
    assert starts(platform) == 2


@pytest.mark.parametrize(("code", "error"), [(10, ConfigError), (13, OutOfMemoryError), (77, JobError)])
def test_a_failed_job_is_raised_as_what_it_said(platform: LocalPlatform, code: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="a-code: a place: a message \\(a hint\\)"):
        run(platform, job(failed=code))


def test_a_failed_job_is_started_again(platform: LocalPlatform) -> None:
    for _ in range(2):
        with pytest.raises(OutOfMemoryError):
            run(platform, job(failed=13))
    assert starts(platform) == 2


def test_a_job_that_died_without_a_word_is_told_with_its_last_one(platform: LocalPlatform) -> None:
    with pytest.raises(JobError, match="ended with exit code 5: Traceback: boom"):
        run(platform, job(silent=5))


def test_a_job_that_was_killed_may_be_tried_again(platform: LocalPlatform) -> None:
    def kill(event: dict[str, Any]) -> None:
        os.killpg(int((platform.home / "jobs/w/j/pid").read_text()), signal.SIGKILL)

    with pytest.raises(KilledError) as caught:
        platform.run_job(job(steps=100, pause=0.1), kill)
    assert caught.value.retryable


def test_stopping_the_jobs_of_a_workspace_leaves_none(platform: LocalPlatform, tmp_path: Path) -> None:
    spec = job(wait_for=str(tmp_path / "never"))

    def killed() -> None:
        with pytest.raises(KilledError):
            run(platform, spec)

    thread = threading.Thread(target=killed)
    thread.start()
    while not Process(platform.home / "jobs/w/j").running:
        time.sleep(0.05)
    assert platform.stop_jobs("other") == []
    assert platform.stop_jobs("w") == ["j"]
    thread.join(timeout=10)
    assert platform.stop_jobs("w") == []


def service(revision: str, port: int | None = None, **arguments: Any) -> ServiceSpec:
    return ServiceSpec(JobSpec("s", "w", "fixture_program", {"workspace": "w", **arguments}), revision, port)


def satisfied(_: Service, http: httpx.Client) -> None:
    """A probe with no demands."""


def test_a_service_comes_up_and_is_found(platform: LocalPlatform) -> None:
    try:
        up = platform.ensure_service(service("r1"), satisfied)
        assert httpx.get(f"{up.url}/health").status_code == 200
        found = platform.service("w")
        assert found is not None
        assert (found.url, found.models, found.revision) == (up.url, ("base", "w"), "r1")
        assert platform.ensure_service(service("r1"), satisfied).adopted
    finally:
        platform.delete("w")


def test_a_new_revision_replaces_the_old_only_when_its_probe_is_satisfied(platform: LocalPlatform) -> None:
    def refuse(_: Service, http: httpx.Client) -> None:
        raise ServiceError("no good answer")

    try:
        old = platform.ensure_service(service("r1"), satisfied)
        with pytest.raises(ServiceError, match="no good answer"):
            platform.ensure_service(service("r2"), refuse)
        found = platform.service("w")
        assert found is not None
        assert found.url == old.url
        new = platform.ensure_service(service("r3"), satisfied)
        assert new.url != old.url
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{old.url}/health")
    finally:
        platform.delete("w")


def test_a_service_that_ends_before_it_serves_is_told_with_its_last_word(platform: LocalPlatform) -> None:
    with pytest.raises(JobError, match="no model"):
        platform.ensure_service(service("r1", fail=True), satisfied)
    assert platform.service("w") is None


def test_a_port_that_is_taken_is_refused_before_anything_starts(platform: LocalPlatform) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port-taken: port {port}"):
            platform.check_service("w", port)
        with pytest.raises(PortTakenError):
            platform.ensure_service(service("r1", port), satisfied)
    assert not (platform.home / "services/w/r1/job.json").exists()


def test_deleting_a_workspace_stops_and_forgets_everything(platform: LocalPlatform) -> None:
    run(platform, job())
    platform.ensure_service(service("r1"), satisfied)
    platform.write_status(status("w"))
    assert platform.delete("w") == ["service r1"]
    assert platform.service("w") is None
    assert platform.read_status("w") is None
    assert not (platform.home / "jobs/w").exists()
    assert platform.delete("w") == []


def test_a_status_is_read_back_as_it_was_written(platform: LocalPlatform) -> None:
    written = status("a")
    written.facts["n"] = [1]
    written.set(INFERENCE_READY, "False", "r", "m")
    platform.write_status(status("b"))
    platform.write_status(written)
    assert platform.read_status("a") == written
    assert [s.name for s in platform.statuses()] == ["a", "b"]
    assert json.loads((platform.home / "workspaces/a.json").read_text())["facts"] == {"n": [1]}


def test_who_watches_is_told_of_each_status_once_and_then_of_changes(platform: LocalPlatform) -> None:
    platform.write_status(status("a"))
    platform.write_status(status("b"))
    seen = platform.watch_statuses("b")
    assert next(seen).state == "Pending"
    changed = status("b")
    changed.state = "Running"
    platform.write_status(changed)
    assert next(seen).state == "Running"


def test_a_service_that_no_longer_satisfies_is_replaced_by_a_new_one(platform: LocalPlatform) -> None:
    try:
        old = platform.ensure_service(service("r1"), satisfied)
        asked: list[str] = []

        def not_the_old(up: Service, http: httpx.Client) -> None:
            asked.append(up.url)
            if len(asked) == 1:
                raise ServiceError("answers 503")

        new = platform.ensure_service(service("r1"), not_the_old)
        assert asked[0] == old.url
        assert not new.adopted
        assert httpx.get(f"{new.url}/health").status_code == 200
    finally:
        platform.delete("w")


def test_two_workspaces_that_roll_out_at_once_both_find_a_port(platform: LocalPlatform) -> None:
    def spec(name: str) -> ServiceSpec:
        return ServiceSpec(JobSpec("s", name, "fixture_program", {"workspace": name}), "r1")

    urls: list[str] = []
    threads = [
        threading.Thread(target=lambda n=name: urls.append(platform.ensure_service(spec(n), satisfied).url))
        for name in ("a", "b", "c")
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(urls)) == 3
    finally:
        for name in ("a", "b", "c"):
            platform.delete(name)


def test_a_service_that_was_not_probed_yet_is_not_shown(platform: LocalPlatform) -> None:
    try:
        platform.ensure_service(service("r9"), satisfied)
        seen: list[str] = []

        def look(_: Service, http: httpx.Client) -> None:
            found = platform.service("w")
            seen.append(found.revision if found else "")

        platform.ensure_service(service("r1"), look)
        assert seen == ["r9"]
    finally:
        platform.delete("w")


def test_a_host_that_is_none_of_this_machines_is_refused_early(home: Path) -> None:
    platform = LocalPlatform(Settings(serve_host="no-such-host.invalid"))
    with pytest.raises(InputError, match="KAITO_FLOWS_SERVE_HOST: cannot listen on no-such-host"):
        platform.check_service("w", None)


@pytest.mark.parametrize("name", ["", "..", "../../x", "a/b", "A", "a" * 64, "/"])
def test_a_name_that_no_workspace_has_makes_no_path(platform: LocalPlatform, name: str) -> None:
    for call in (platform.delete, platform.stop_jobs, platform.read_status, platform.check_known):
        with pytest.raises(InputError, match="is no Workspace's name"):
            call(name)
    with pytest.raises(InputError):
        platform.write_status(status(name))
    assert not platform.home.exists() or not list(platform.home.rglob("*.json"))


def test_a_status_does_not_call_a_service_ready_that_is_not_up(platform: LocalPlatform) -> None:
    ready = status("w")
    ready.set(INFERENCE_READY, "True", "r", "m")
    platform.write_status(ready)
    try:
        platform.ensure_service(service("r1"), satisfied)
        assert platform.statuses()[0].value(INFERENCE_READY) == "True"
        Process(platform.home / "services/w/r1").stop()
        assert platform.statuses()[0].value(INFERENCE_READY) == "False"
    finally:
        platform.delete("w")


def test_who_works_for_a_deleted_workspace_is_told(platform: LocalPlatform) -> None:
    platform.write_status(status("w"))
    platform.check_known("w")
    platform.delete("w")
    with pytest.raises(RunError, match="workspace-deleted"):
        platform.check_known("w")
