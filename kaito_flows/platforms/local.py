"""This machine as a platform: jobs and services are detached processes, each in a folder of its own.

<home>/jobs/<workspace>/<job>/            a job's root: job.json, events, mnt/, workspace/
<home>/services/<workspace>/<revision>/   a service's root
<home>/workspaces/<workspace>.json        the status
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from kaito_flows.canonical import canonical_digest
from kaito_flows.errors import KaitoFlowsError, KilledError, PortTakenError, ServiceError, disk_errors, from_job_exit
from kaito_flows.oci.layout import Layout
from kaito_flows.platforms.base import Event, JobSpec, Service, ServiceSpec
from kaito_flows.platforms.processes import KILLED, Process, locked
from kaito_flows.reference import Reference
from kaito_flows.settings import Settings

FIRST_PORT = 5000
_PREEMPTED = 143
# Threads that wait by spinning take the core from the one that works (two processes share few cores here).
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class LocalPlatform:
    """Runs jobs and services as processes that outlive their starter; see `Platform` for what each method promises."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.home = settings.folder
        self.downloads = self.home / "cache" / "downloads"

    def repository(self, image: str) -> Layout:
        """Return the folder that stands for the repository of an image reference.

        Raises:
            ImageError: it is no image reference.
        """
        return Layout(self.settings.repository(Reference.parse(image)))

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Run the job to its end, or follow the one that already runs; return its `completed` event.

        A job that ended well is not run again. One that failed, was killed or was preempted is started again in the
        same folder, where its checkpoints are.

        Raises:
            KaitoFlowsError: the class that its exit code stands for; `KilledError` when it was killed.
        """
        return self._run(self.home / "jobs" / spec.workspace / spec.name, spec, on_event)

    def ensure_weights(self, preset: str, source: Mapping[str, Any], on_event: Callable[[Event], None]) -> Path:
        """Return the folder of the preset's model, made on the first call and shared by all workspaces.

        Raises:
            WeightsError: the source cannot be had, or is not what the preset says.
        """
        digest = canonical_digest(source)[:12]
        root = self.home / "models" / f"{preset}-{digest}"
        folder = root / "workspace" / "weights"
        # The program writes source.json last.
        if (folder / "source.json").exists():
            return folder
        (root / "exit").unlink(missing_ok=True)
        arguments = {"version": 1, "source": source, "cache": str(self.home / "cache" / "packages")}
        self._run(root, JobSpec(f"weights-{preset}", preset, "weights", arguments), on_event)
        return folder

    def _run(self, folder: Path, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        job = {**spec.arguments, "root": str(folder)}
        with locked(folder):
            process = Process(folder)
            same = _same_job(folder, job)
            if process.pid is not None and not same:
                process.stop()
            if process.pid is None and not (same and process.exit_code == 0):
                _furnish(folder, spec)
                process.start(_module(spec), job, _ENVIRONMENT)
        last: Event = {}
        for event in process.events():
            last = event
            on_event(event)
        return _outcome(process, spec, last)

    def stop_jobs(self, workspace: str) -> list[str]:
        """Stop every job of the workspace that still runs; return their names."""
        folders = sorted((self.home / "jobs" / workspace).glob("*/"))
        return [folder.name for folder in folders if Process(folder).stop()]

    def forget_job(self, spec: JobSpec) -> None:
        """Remove the job's folder; what it published stays."""
        shutil.rmtree(self.home / "jobs" / spec.workspace / spec.name, ignore_errors=True)

    def check_port(self, workspace: str, port: int | None) -> None:
        """Say early that a wished-for port is taken by somebody else.

        Raises:
            PortTakenError: another process listens there.
        """
        if port is None:
            return
        ours = self.service(workspace)
        if not (ours and ours.url.endswith(f":{port}")) and not _is_free(self.settings.serve_host, port):
            raise PortTakenError(
                f"another process listens on {self.settings.serve_host}:{port}",
                place=f"port {port}",
                hint="choose another with --port or KAITO_FLOWS_SERVE_PORT, or stop that process",
            )

    def ensure_service(self, spec: ServiceSpec, probe: Callable[[Service], None]) -> Service:
        """Bring the service up and hand it to `probe`; the old revision stays until `probe` is satisfied.

        With a port asked for by number, old and new cannot stand side by side: then the old one goes first.

        Raises:
            ServiceError: it did not come up.
            PortTakenError: somebody else listens on the port.
        """
        workspace, home = spec.job.workspace, self.home / "services" / spec.job.workspace
        with locked(home):
            current = self.service(workspace)
            if current and current.revision == spec.revision and spec.port in (None, _port_of(current)):
                probe(current)
                return current
            if current and spec.port == _port_of(current):
                Process(home / current.revision).stop()
            self.check_port(workspace, spec.port)
            port = spec.port or _free_port(self.settings.serve_host)
            folder = home / spec.revision
            process = Process(folder)
            if process.pid is not None:
                process.stop()
            _furnish(folder, spec.job)
            job = {**spec.job.arguments, "root": str(folder), "host": self.settings.serve_host, "port": port}
            process.start(_module(spec.job), job, _ENVIRONMENT)
            try:
                service = self._await(process, spec)
                probe(service)
            except BaseException:
                process.stop()
                raise
            for other in home.glob("*/"):
                if other != folder:
                    Process(other).stop()
                    shutil.rmtree(other, ignore_errors=True)
        return service

    def service(self, workspace: str) -> Service | None:
        """The workspace's service, if a process of it runs and has said that it serves."""
        for folder in sorted((self.home / "services" / workspace).glob("*/")):
            if Process(folder).pid is not None:
                for event in _read_events(folder):
                    if event.get("event") == "serving":
                        url = f"http://{event['host']}:{event['port']}"
                        return Service(workspace, url, tuple(event["models"]), folder.name, adopted=True)
        return None

    def read_status(self, workspace: str) -> Event | None:
        """What was last written of the workspace."""
        with contextlib.suppress(FileNotFoundError):
            status: Event = json.loads(self._status_path(workspace).read_bytes())
            return status
        return None

    def statuses(self) -> list[Event]:
        """The status of every workspace that this machine knows, by name."""
        names = sorted(path.stem for path in (self.home / "workspaces").glob("*.json"))
        return [status for name in names if (status := self.read_status(name))]

    def write_status(self, workspace: str, status: Mapping[str, Any]) -> None:
        """Remember the status of the workspace, whole or not at all."""
        path = self._status_path(workspace)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(status, indent=1))
            partial.replace(path)

    def delete(self, workspace: str) -> list[str]:
        """Stop everything of the workspace and forget it; return what was stopped. Images stay."""
        stopped = [f"job {name}" for name in self.stop_jobs(workspace)]
        home = self.home / "services" / workspace
        if home.exists():
            with locked(home):
                stopped += [f"service {folder.name}" for folder in sorted(home.glob("*/")) if Process(folder).stop()]
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(self.home / "jobs" / workspace, ignore_errors=True)
        self._status_path(workspace).unlink(missing_ok=True)
        return stopped

    def _status_path(self, workspace: str) -> Path:
        return self.home / "workspaces" / f"{workspace}.json"

    def _await(self, process: Process, spec: ServiceSpec, timeout_seconds: float = 1800.0) -> Service:
        deadline = time.monotonic() + timeout_seconds
        last: Event = {}
        for event in process.events():
            last = event
            if event.get("event") == "serving":
                url = f"http://{event['host']}:{event['port']}"
                service = Service(spec.job.workspace, url, tuple(event["models"]), spec.revision, adopted=False)
                while time.monotonic() < deadline and process.pid is not None:
                    with contextlib.suppress(httpx.TransportError):
                        if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                            return service
                    time.sleep(0.1)
        if process.pid is not None:
            process.stop()
            raise ServiceError(f"not healthy after {timeout_seconds:.0f} s", place=str(process.folder / "stderr"))
        _outcome(process, spec.job, last)
        raise ServiceError("ended before it served", place=str(process.folder / "stderr"))


def _module(spec: JobSpec) -> str:
    return f"kaito_flows.containers.{spec.program}"


def _same_job(folder: Path, job: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / "job.json").read_bytes()) == json.loads(json.dumps(job)))
    except (OSError, ValueError):
        return False


def _furnish(folder: Path, spec: JobSpec) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in spec.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, target in spec.links.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(target)


def _read_events(folder: Path) -> Iterator[Event]:
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "stdout").read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _outcome(process: Process, spec: JobSpec, last: Event) -> Event:
    """Return the last event of a job that ended well, else raise what it ended with."""
    code = process.exit_code
    if code == 0 and last.get("event") == "completed":
        return last
    logs = process.folder / "stderr"
    if last.get("event") == "failed" and code is not None:
        place = last.get("place") or f"{spec.program} of {spec.workspace}"
        raise from_job_exit(code, last["message"], code=last["code"], place=place, hint=last.get("hint", ""))
    if code in (KILLED, _PREEMPTED):
        raise KilledError(
            "the process was killed",
            place=f"{spec.program} of {spec.workspace}",
            hint="if nobody did, the machine may have run out of memory: see `dmesg`",
        )
    said = process.log_tail(1)
    error: KaitoFlowsError = from_job_exit(
        code or 1,
        f"ended with exit code {code}: {said[0] if said else 'no word'}",
        place=str(logs),
        hint="read the log",
    )
    raise error


def _port_of(service: Service) -> int:
    return int(service.url.rsplit(":", 1)[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    for port in range(FIRST_PORT, FIRST_PORT + 1000):
        if _is_free(host, port):
            return port
    raise PortTakenError(f"no free port from {FIRST_PORT} to {FIRST_PORT + 999}", place=host)
