"""This machine as a platform: jobs and services are detached processes, each in a folder of its own.

<home>/jobs/<workspace>/<job>/            a job's root: job.json, events, mnt/, workspace/
<home>/services/<workspace>/<revision>/   a service's root; `current` names the revision that serves
<home>/workspaces/<workspace>.json        the status
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import httpx

from kaito_flows.canonical import canonical_digest
from kaito_flows.errors import (
    InputError,
    KaitoFlowsError,
    KilledError,
    PortTakenError,
    RunError,
    ServiceError,
    disk_errors,
    from_job_exit,
)
from kaito_flows.oci.layout import Layout
from kaito_flows.platforms.base import Event, JobSpec, Service, ServiceSpec, Weights
from kaito_flows.platforms.processes import KILLED, Process, locked
from kaito_flows.reference import Reference
from kaito_flows.settings import Settings
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.status import INFERENCE_READY, WorkspaceStatus

FIRST_PORT = 5000
PREEMPTED = 143
# Threads that wait by spinning take the core from the one that works (two processes share few cores here).
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


class LocalPlatform:
    """Runs jobs and services as processes that outlive their starter; see `Platform` for what each method promises."""

    kind: Literal["local", "kubernetes"] = "local"
    namespace = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.home = settings.folder

    @property
    def downloads(self) -> Path:
        """Where downloaded data is kept between runs."""
        return self.home / "cache" / "downloads"

    def begin(self, workspace: Workspace) -> None:
        """On this machine the status is all that is known of a Workspace, and the run writes it."""
        _folder_name(workspace.name)

    def config_text(self, name: str, key: str) -> str | None:
        """There are no ConfigMaps here: a file's are read with it."""
        return None

    def check_secrets(self, names: Sequence[str], *, hub: str = "") -> None:
        """Nothing on this machine has to be unlocked."""

    def check_output(self, workspace: str, image: str) -> None:
        """On this machine, who runs a Workspace runs it by hand, and sees where it publishes."""

    def repository(self, image: str, secrets: Sequence[str] = ()) -> Layout:
        """Return the folder that stands for the repository of an image reference.

        Raises:
            ImageError: it is no image reference.
        """
        return Layout(self.settings.layout(Reference.parse(image)))

    def warm_up(self, workspace: str, nodes: Sequence[str], weights: Weights) -> None:
        """What jobs need lies on this machine."""

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Run the job to its end, or follow the one that already runs; return its `completed` event.

        A job that ended well is not run again. One that failed, was killed or was preempted is started again in the
        same folder, where its checkpoints are.

        Raises:
            KaitoFlowsError: the class that its exit code stands for; `KilledError` when it was killed.
        """
        return self._run(self._jobs(spec.workspace) / spec.name, spec, on_event)

    def ensure_weights(self, weights: Weights, on_event: Callable[[Event], None]) -> Path:
        """Return the folder of the preset's model, made on the first call and shared by all workspaces.

        Raises:
            WeightsError: the source cannot be had, or is not what the preset says.
        """
        root, folder = self._model(weights)
        # The program writes source.json last.
        if (folder / "source.json").exists():
            return folder
        (root / "exit").unlink(missing_ok=True)
        arguments = {"version": 1, "source": weights.source, "cache": str(self.home / "cache" / "packages")}
        try:
            self._run(root, JobSpec(f"weights-{weights.preset}", weights.preset, "weights", arguments), on_event)
        except BaseException:
            # It is no workspace's job that `stop_jobs` would find; another run that waits for it starts it again.
            Process(root).stop()
            raise
        return folder

    def ensure_tokenizer(
        self, weights: Weights, on_event: Callable[[Event], None], environment: Mapping[str, str] = MappingProxyType({})
    ) -> Path:
        """Return a folder with the tokenizer alone, for data that is prepared for pods.

        `environment` says where the Hub's token and the logins of registries are, if not where this user has them.

        Raises:
            WeightsError: the source cannot be had.
        """
        root = self.home / "tokenizers" / f"{weights.preset}-{canonical_digest(dict(weights.source))[:12]}"
        folder = root / "workspace" / "weights"
        if (folder / "source.json").exists():
            return folder
        cache = str(self.home / "cache" / "packages")
        arguments = {"version": 1, "source": weights.source, "cache": cache, "parts": "tokenizer"}
        job = JobSpec(f"tokenizer-{weights.preset}", weights.preset, "weights", arguments)
        (root / "exit").unlink(missing_ok=True)
        self._run(root, job, on_event, environment)
        return folder

    def has_weights(self, weights: Weights) -> bool:
        """Whether `ensure_weights` has nothing to do."""
        return (self._model(weights)[1] / "source.json").exists()

    def _model(self, weights: Weights) -> tuple[Path, Path]:
        root = self.home / "models" / f"{weights.preset}-{canonical_digest(dict(weights.source))[:12]}"
        return root, root / "workspace" / "weights"

    def _run(
        self,
        folder: Path,
        spec: JobSpec,
        on_event: Callable[[Event], None],
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Event:
        job = spec.job_file(str(folder))
        with locked(folder):
            process = Process(folder)
            same = _same_job(folder, job)
            if process.running and not same:
                process.stop()
            if not process.running and not (same and process.exit_code == 0):
                self._furnish(folder, spec)
                environment = {**_ENVIRONMENT, **environment}
                process.start(_module(spec), job, environment, secrets=spec.program == "weights")
        last: Event = {}
        for event in process.events():
            last = event
            on_event(event)
        return _outcome(process, spec, last)

    def stop_jobs(self, workspace: str) -> list[str]:
        """Stop every job of the workspace that still runs; return their names."""
        folders = sorted(self._jobs(workspace).glob("*/"))
        return [folder.name for folder in folders if Process(folder).stop()]

    def forget_job(self, spec: JobSpec) -> None:
        """Remove the job's folder, unless it runs again; what it published stays."""
        folder = self._jobs(spec.workspace) / spec.name
        with locked(folder):
            if not Process(folder).running:
                shutil.rmtree(folder, ignore_errors=True)

    def check_service(self, workspace: str, port: int | None) -> None:
        """Say early that a service could not listen where it is wished for.

        Raises:
            PortTakenError: another process listens on the port.
            InputError: (code `invalid-setting`) the host is none of this machine's.
        """
        host = self.settings.serve_host
        if not _is_free(host, 0):
            hint = "127.0.0.1, 0.0.0.0, or an address of this machine"
            place = "KAITO_FLOWS_SERVE_HOST"
            raise InputError(f"cannot listen on {host}", place=place, hint=hint, code="invalid-setting")
        if port is None:
            return
        ours = self.service(workspace)
        if not (ours and _port_of(ours) == port) and not _is_free(host, port):
            raise PortTakenError(
                f"another process listens on {host}:{port}",
                place=f"port {port}",
                hint="choose another with --port or KAITO_FLOWS_SERVE_PORT, or stop that process",
            )

    def ensure_service(
        self,
        spec: ServiceSpec,
        probe: Callable[[Service, httpx.Client], None],
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Service:
        """Bring the service up and hand it to `probe`; the old revision stays until `probe` is satisfied.

        One that is up with the same revision is taken, if it satisfies the probe. With a port asked for by number, old
        and new cannot stand side by side: then the old one goes first.

        Raises:
            ServiceError: it did not come up.
            PortTakenError: somebody else listens on the port.
        """
        workspace, home = spec.job.workspace, self._services(spec.job.workspace)
        with locked(home):
            current = self.service(workspace)
            if current and current.revision == spec.revision and spec.port in (None, _port_of(current)):
                try:
                    self._probe(current, probe)
                except ServiceError:
                    Process(home / current.revision).stop()
                else:
                    _remove_others(home, current.revision)
                    return current
            if current and spec.port == _port_of(current):
                Process(home / current.revision).stop()
            self.check_service(workspace, spec.port)
            service = self._bring_up(home / spec.revision, spec)
            try:
                self._probe(service, probe)
                with disk_errors(home):
                    partial = home / "current.partial"
                    partial.write_text(spec.revision)
                    partial.replace(home / "current")
            except BaseException:
                Process(home / spec.revision).stop()
                raise
            _remove_others(home, spec.revision)
        return service

    def _bring_up(self, folder: Path, spec: ServiceSpec) -> Service:
        host, first = self.settings.serve_host, FIRST_PORT
        while True:
            port = spec.port or _free_port(host, first)
            process = Process(folder)
            process.stop()
            self._furnish(folder, spec.job)
            job = {**spec.job.arguments, "root": str(folder), "host": host, "port": port}
            process.start(_module(spec.job), job, _ENVIRONMENT)
            try:
                return _await(process, spec)
            except PortTakenError:
                # Nobody asked for this one, and somebody was faster.
                if spec.port is not None:
                    raise
                first = port + 1
            except BaseException:
                process.stop()
                raise

    def serves(self, spec: ServiceSpec) -> bool:
        """This machine is always there: that it is up already saves nothing."""
        return False

    def service(self, workspace: str) -> Service | None:
        """The workspace's service, if the revision that was rolled out last is up."""
        home = self._services(workspace)
        with contextlib.suppress(FileNotFoundError):
            folder = home / (home / "current").read_text()
            if Process(folder).running and (event := _serving(folder)):
                return Service(workspace, _url(event), tuple(event["models"]), folder.name, adopted=True)
        return None

    def client(self, service: Service) -> httpx.Client:
        """An HTTP client whose base address is the service."""
        return httpx.Client(base_url=service.url)

    def _probe(self, service: Service, probe: Callable[[Service, httpx.Client], None]) -> None:
        with self.client(service) as http:
            probe(service, http)

    def read_status(self, workspace: str) -> WorkspaceStatus | None:
        """What was last written of the workspace."""
        with contextlib.suppress(FileNotFoundError):
            status = WorkspaceStatus.from_dict(json.loads(self._status_path(workspace).read_bytes()))
            if status.value(INFERENCE_READY) == "True" and self.service(workspace) is None:
                status.set(INFERENCE_READY, "False", "WorkspaceInferenceStatusPending", "the service is not up")
            return status
        return None

    def statuses(self) -> list[WorkspaceStatus]:
        """The status of every workspace that this machine knows, by name."""
        names = sorted(path.stem for path in (self.home / "workspaces").glob("*.json"))
        return [status for name in names if (status := self.read_status(name)) is not None]

    def watch_statuses(self, workspace: str = "") -> Iterator[WorkspaceStatus]:
        """Yield the status of one workspace or of all, and then again whenever one changes, without an end."""
        seen: dict[str, WorkspaceStatus] = {}
        while True:
            for status in self.statuses():
                if workspace in ("", status.name) and seen.get(status.name) != status:
                    seen[status.name] = status
                    yield status
            time.sleep(1.0)

    def write_status(self, status: WorkspaceStatus) -> None:
        """Remember the status of the workspace, whole or not at all."""
        path = self._status_path(status.name)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            try:
                partial.write_text(json.dumps(status.as_dict(), indent=1))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def record(self, workspace: str, reason: str, message: str, *, warning: bool = False) -> None:
        """On this machine the status says it all."""

    def check_known(self, workspace: str) -> None:
        """Raise if the workspace was deleted: who still works for it is to stop.

        Raises:
            RunError: (code `workspace-deleted`) nothing is known of it.
        """
        if not self._status_path(workspace).exists():
            raise RunError("was deleted while it ran", place=workspace, hint="run it again", code="workspace-deleted")

    def delete(self, workspace: str) -> list[str]:
        """Forget the workspace and stop everything of it; return what was stopped. Images stay.

        What still runs for it finds out by `check_known`, and starts nothing again.
        """
        self._status_path(workspace).unlink(missing_ok=True)
        jobs, services = self._jobs(workspace), self._services(workspace)
        stopped = []
        for folder in sorted(jobs.glob("*/")):
            with locked(folder):
                stopped += [f"job {folder.name}"] if Process(folder).stop() else []
                shutil.rmtree(folder, ignore_errors=True)
        if services.exists():
            with locked(services):
                stopped += [f"service {f.name}" for f in sorted(services.glob("*/")) if Process(f).stop()]
                shutil.rmtree(services, ignore_errors=True)
        shutil.rmtree(jobs, ignore_errors=True)
        return stopped

    def _furnish(self, folder: Path, spec: JobSpec) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in spec.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            if spec.weights is not None:
                path = folder / "workspace" / "weights"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.symlink_to(self._model(spec.weights)[1])

    def free_bytes(self) -> int:
        """Bytes that are free where this platform keeps its files."""
        with disk_errors(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.home).free

    def _jobs(self, workspace: str) -> Path:
        return self.home / "jobs" / _folder_name(workspace)

    def _services(self, workspace: str) -> Path:
        return self.home / "services" / _folder_name(workspace)

    def _status_path(self, workspace: str) -> Path:
        return self.home / "workspaces" / f"{_folder_name(workspace)}.json"


def _folder_name(workspace: str) -> str:
    # A name becomes part of paths that are written and removed.
    if len(workspace) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", workspace):
        raise InputError(f"{workspace!r} is no Workspace's name", place="metadata.name", hint="a DNS-1123 label")
    return workspace


def _await(process: Process, spec: ServiceSpec, timeout_seconds: float = 1800.0) -> Service:
    """Wait until the process says that it serves, and answers as healthy."""
    deadline = time.monotonic() + timeout_seconds
    while process.running and time.monotonic() < deadline:
        if event := _serving(process.folder):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{_url(event)}/health", timeout=5.0).status_code == 200:
                    models = tuple(event["models"])
                    return Service(spec.job.workspace, _url(event), models, spec.revision, adopted=False)
        time.sleep(0.1)
    logs = str(process.folder / "stderr")
    if process.stop():
        raise ServiceError(f"not healthy after {timeout_seconds:.0f} s", place=logs, hint="read the log")
    _outcome(process, spec.job, [{}, *_read_events(process.folder)][-1])
    raise ServiceError("ended before it served", place=logs, hint="read the log")


def _serving(folder: Path) -> Event | None:
    return next((event for event in _read_events(folder) if event.get("event") == "serving"), None)


def _url(serving: Event) -> str:
    host = f"[{serving['host']}]" if ":" in serving["host"] else serving["host"]
    return f"http://{host}:{serving['port']}"


def _remove_others(home: Path, revision: str) -> None:
    for other in home.glob("*/"):
        if other.name != revision:
            Process(other).stop()
            shutil.rmtree(other, ignore_errors=True)


def _module(spec: JobSpec) -> str:
    return f"kaito_flows.containers.{spec.program}"


def _same_job(folder: Path, job: Mapping[str, Any]) -> bool:
    """Whether that job was started there, whatever was thought of the memory that it takes."""
    try:
        there: dict[str, Any] = json.loads((folder / "job.json").read_bytes())
        return bool({**there, "memory": None} == {**json.loads(json.dumps(job)), "memory": None})
    except (OSError, ValueError):
        return False


def _read_events(folder: Path) -> Iterator[Event]:
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "stdout").read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _outcome(process: Process, spec: JobSpec, last: Event) -> Event:
    """Return the last event of a job that ended well, else raise what it ended with.

    The last event counts also where the folder is gone: another run that followed the job has cleared it away.
    """
    code, logs = process.exit_code, str(process.folder / "stderr")
    if last.get("event") == "completed" and code in (0, None, KILLED):
        return last
    if last.get("event") == "failed":
        place = last.get("place") or logs
        raise from_job_exit(code or 1, last["message"], code=last["code"], place=place, hint=last.get("hint", ""))
    if code in (KILLED, PREEMPTED, None):
        raise KilledError(
            "the process was killed",
            place=f"{spec.program} of {spec.workspace}",
            hint="if nobody did, the machine may have run out of memory: see `dmesg`",
        )
    said = process.log_tail(1)
    error: KaitoFlowsError = from_job_exit(
        code, f"ended with exit code {code}: {said[0] if said else 'no word'}", place=logs, hint="read the log"
    )
    raise error


def _port_of(service: Service) -> int:
    return int(service.url.rsplit(":", 1)[1])


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError:
        return False
    return True


def _free_port(host: str, first: int) -> int:
    for port in range(first, FIRST_PORT + 1000):
        if _is_free(host, port):
            return port
    raise ServiceError(f"no free port from {FIRST_PORT} to {FIRST_PORT + 999}", place=host, hint="name one with --port")
