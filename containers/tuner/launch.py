"""Several processes for one training: this program starts itself once for each, on this machine and on others.

    the program ─► rendezvous with the other machines' programs ─► a worker for each GPU ─► what they came to
                                                                        │ events
                                                                        ▼
                                                         those of process 0, to standard output

PyTorch's elastic agent starts and watches the workers. Machines find each other at `world.rendezvous`, which one of
them serves: in pods the one whose `KAITO_FLOWS_NODE_RANK` is 0, elsewhere the one with the host's address. A worker
that fails ends the others: the job's restart policy
starts it all again, from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from kaito_flows.containers.program import EVENTS, emit
from kaito_flows.containers.tuner.job import TunerJob
from kaito_flows.errors import JobError, KaitoFlowsError, KilledError, PreemptedError, from_job_exit

__all__ = [
    "NODE_RANK",
    "PATIENCE_SECONDS",
    "RENDEZVOUS",
    "STARTED",
    "is_worker",
    "launch",
    "meeting_place",
    "speak_through_launcher",
]

RENDEZVOUS = "KAITO_FLOWS_RENDEZVOUS"
"""The environment variable in which a worker finds the host and port of the store that all of them share."""

STARTED = "KAITO_FLOWS_STARTED"
"""The environment variable with the time when the launcher was started, in seconds since 1970."""

NODE_RANK = "KAITO_FLOWS_NODE_RANK"
"""The environment variable with the number of this machine; 0 serves the place where all of them meet."""

_FOLDER = "KAITO_FLOWS_WORKER_EVENTS"
PATIENCE_SECONDS = 900
"""How long a process waits for the others; the slowest thing on the way is a push of the last checkpoint."""

JOIN_SECONDS = 1800
"""How long machines wait for each other: the slowest may have to be booted and to pull its image."""


def is_worker() -> bool:
    """Whether a launcher started this process."""
    return _FOLDER in os.environ


def speak_through_launcher() -> None:
    """Let this worker's events go to its launcher."""
    os.environ[EVENTS] = str(Path(os.environ[_FOLDER]) / os.environ["LOCAL_RANK"])


def launch(job: TunerJob) -> dict[str, Any]:
    """Train with as many processes as the job says, and return what they came to.

    Raises:
        KaitoFlowsError: what a worker failed with.
        PreemptedError: SIGTERM came.
        KilledError: a worker was killed, or a machine did not come or is gone (code `peer-lost`).
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.signal(signal.SIGTERM, _stop_before_start)
    with tempfile.TemporaryDirectory(prefix="kaito-flows-") as folder:
        workers = [_Worker(Path(folder) / str(number)) for number in range(job.processes)]
        rendezvous, is_host = meeting_place(job)
        os.environ |= {_FOLDER: folder, RENDEZVOUS: rendezvous, STARTED: str(psutil.Process().create_time())}
        # Each process computes on its own share of the cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.processes)))
        config = LaunchConfig(
            min_nodes=job.nodes,
            max_nodes=job.nodes,
            nproc_per_node=job.processes,
            run_id=job.identity,
            rdzv_backend="c10d",
            rdzv_endpoint=rendezvous,
            rdzv_configs={"timeout": JOIN_SECONDS, "read_timeout": JOIN_SECONDS, **is_host},
            # What fails would fail again, and what was killed goes on when the job is started again.
            max_restarts=0,
            signals_to_handle="SIGTERM",
            shutdown_timeout=PATIENCE_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "kaito_flows.containers.tuner", sys.argv[1])
        except ChildFailedError as exc:
            raise _failure(workers, {f.local_rank: f.exitcode for f in exc.failures.values()}) from exc
        except SignalException as exc:
            raise _failure(workers, {}, stopped=True) from exc
        except (RendezvousError, DistError, ConnectionError, TimeoutError) as exc:
            message = f"the other machines were not met at {rendezvous}: {exc}"
            raise KilledError(message, hint="start the same job again", code="peer-lost") from exc
        return _completed(workers)


def _stop_before_start(_number: int, _frame: FrameType | None) -> NoReturn:
    raise PreemptedError("stopped by SIGTERM before the first step", hint="start the same job again")


def meeting_place(job: TunerJob) -> tuple[str, dict[str, bool]]:
    """Return where this machine finds the others, and whether it is the one that serves the place, if that is known.

    Raises:
        KilledError: (code `peer-lost`) the one that serves it did not come.
    """
    if job.world is None or job.world.rendezvous is None:
        return f"127.0.0.1:{_free_port()}", {}
    host, _, port = job.world.rendezvous.rpartition(":")
    rank = os.environ.get(NODE_RANK)
    if rank is None or job.nodes == 1:
        return job.world.rendezvous, {}
    if rank == "0":
        # The name of a pod that has just come is not known yet, or still leads to the one before.
        return f"127.0.0.1:{port}", {"is_host": True}
    _await_host(host.strip("[]"), int(port))
    return job.world.rendezvous, {"is_host": False}


def _await_host(host: str, port: int) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as exc:
            if time.monotonic() > deadline:
                message = f"nobody serves {host}:{port}: {exc}"
                raise KilledError(message, hint="start the same job again", code="peer-lost") from exc
        time.sleep(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class _Worker:
    """A worker's events: those of process 0 are handed on, and the last words of each are kept."""

    pipe: Path
    rank: int | None = None
    completed: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        os.mkfifo(self.pipe)
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        with self.pipe.open(encoding="utf-8") as lines:
            for line in lines:
                self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        match told.pop("event"):
            case "worker":
                self.rank = told["rank"]
            case "completed":
                self.completed = told
            case "worker-failed":
                self.failed = told
            case "failed":
                # One that ended before it was one of many has no exit code in what it says.
                self.failed = self.failed or told
            case event if self.rank == 0:
                emit(event, **told)

    def last_words(self) -> dict[str, Any] | None:
        """Wait for the end of what it says, unless it never began, and return with what it failed."""
        self.thread.join(timeout=5)
        return self.failed


def _completed(workers: list[_Worker]) -> dict[str, Any]:
    for worker in workers:
        worker.last_words()
        if worker.completed is not None:
            return worker.completed
    raise JobError("every worker ended well, and none said with what", place="tuner")


def _failure(workers: list[_Worker], codes: dict[int, int], *, stopped: bool = False) -> KaitoFlowsError:
    """Return the error that says most: the first that is not about another process's end."""
    told = [(number, said) for number, worker in enumerate(workers) if (said := worker.last_words())]
    told.sort(key=lambda pair: pair[1]["code"] == "peer-lost")
    if told:
        number, said = told[0]
        code = said.get("exit_code", codes.get(number, 1))
        return from_job_exit(code, **{key: said.get(key, "") for key in ("message", "code", "place", "hint")})
    hint = "start the same job again: it goes on from its last checkpoint"
    if stopped:
        return PreemptedError("stopped by SIGTERM before the first step", hint="start the same job again")
    if any(code < 0 for code in codes.values()):
        number, code = next((n, c) for n, c in codes.items() if c < 0)
        return KilledError(f"process {number} of this machine was killed by signal {-code}", hint=hint)
    return JobError(f"the processes ended with {codes} and said nothing", place="tuner")
