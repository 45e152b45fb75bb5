"""Every error that kaito-flows raises on purpose.

A user sees one line for each: what kind it is (`code`), where (`place`), why (`message`) and what to do (`hint`).

    KaitoFlowsError
    ├── InputError                 what the user wrote or offered; exit code 2
    │   ├── WorkspaceError         the Workspace file; carries every fault found in it
    │   ├── PlanError              the plan cannot hold: no such preset, a GPU that is too small
    │   ├── ConfigError            training_config.yaml, inference_config.yaml; job exit code 10
    │   ├── DatasetError           the data: not reachable, not readable, not chats; job exit code 11
    │   ├── WeightsError           the base model's weights; job exit code 12
    │   ├── ImageError             an image reference or what it points at; job exit code 17
    │   ├── DiskFullError          no room left; job exit code 15
    │   ├── PortTakenError         another process listens there; job exit code 18
    │   └── AccessError            a registry or an API server says no; job exit code 19
    └── RunError                   what failed although the input was right; exit code 1
        ├── OutOfMemoryError       job exit code 13
        ├── DivergedError          the loss is no longer a number; job exit code 14
        ├── UnprovenError          the adapter was not shown to be better than the base; job exit code 16
        ├── PreemptedError         SIGTERM; a checkpoint was saved; job exit code 143; retryable
        ├── KilledError            a job was killed from outside; retryable
        ├── JobError               a job ended in another way
        ├── ServiceError           a service did not come up, or does not answer
        ├── RegistryError          a registry does not answer, or answers with nonsense; job exit code 20; retryable
        ├── ClusterError           the Kubernetes API does not answer; retryable
        ├── CloudError             the cloud does not answer, or fails; retryable
        ├── SchedulingError        no node takes the pod, in the scheduler's words
        │   └── CapacityError      a node cannot be rented now: another size, zone or price may do
        ├── LeaseLostError         nodes are no longer the run's; retryable
        ├── BudgetError            nodes have cost what they may
        ├── ImagePullError         a container's image cannot be pulled
        └── DeadlineError          it took longer than it may

Each class has a `job_exit_code`: the code with which a program in `containers/` ends, and by which the orchestrator
raises the same class again (`from_job_exit`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

__all__ = [
    "AccessError",
    "BudgetError",
    "CapacityError",
    "CloudError",
    "ClusterError",
    "ConfigError",
    "DatasetError",
    "DeadlineError",
    "DiskFullError",
    "DivergedError",
    "Fault",
    "ImageError",
    "ImagePullError",
    "InputError",
    "JobError",
    "KaitoFlowsError",
    "KilledError",
    "LeaseLostError",
    "OutOfMemoryError",
    "PlanError",
    "PortTakenError",
    "PreemptedError",
    "RegistryError",
    "RunError",
    "SchedulingError",
    "ServiceError",
    "UnprovenError",
    "WeightsError",
    "WorkspaceError",
    "disk_errors",
    "from_job_exit",
    "from_text",
]


class KaitoFlowsError(Exception):
    """The root: an error with a stable code, a place, a hint, and whether trying again can help.

    `code` is a kebab-case word that stays the same between releases; a class has one, an instance may be more precise.
    """

    code: str = "error"
    exit_code: ClassVar[int] = 1
    job_exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, place: str = "", hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.place = place
        self.hint = " ".join(hint.split())
        self.code = code or type(self).code

    def __str__(self) -> str:
        """One line: `code: place: message (hint)`."""
        place = f"{self.place}: " if self.place else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.code}: {place}{self.message}{hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.place, self.hint, self.code)

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready facts."""
        return {"code": self.code, "place": self.place, "message": self.message, "hint": self.hint}


def _rebuild(cls: type[KaitoFlowsError], message: str, place: str, hint: str, code: str) -> KaitoFlowsError:
    return cls(message, place=place, hint=hint, code=code)


class InputError(KaitoFlowsError):
    """The user wrote or offered something that cannot be used."""

    code = "invalid-input"
    exit_code = 2
    job_exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a Workspace file: its path (`tuning.method`), a code, what is wrong, and what to do."""

    path: str
    message: str
    hint: str = ""
    code: str = "invalid-workspace"

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.path}: {self.message}{hint}"


class WorkspaceError(InputError):
    """A Workspace that is not valid. `faults` holds every fault that was found, not only the first."""

    code = "invalid-workspace"

    def __init__(self, faults: Sequence[Fault], *, source: str = "") -> None:
        first = faults[0]
        more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
        place = f"{source}: {first.path}" if source and first.path else source or first.path
        super().__init__(first.message + more, place=place, hint=first.hint, code=first.code)
        self.faults = tuple(faults)
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_workspace_error, (self.faults, self.source)

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready facts, every fault among them."""
        faults = [{"path": f.path, "message": f.message, "hint": f.hint, "code": f.code} for f in self.faults]
        return {**super().as_dict(), "faults": faults}


def _rebuild_workspace_error(faults: Sequence[Fault], source: str) -> WorkspaceError:
    return WorkspaceError(faults, source=source)


class PlanError(InputError):
    """The plan cannot hold: nothing was started."""

    code = "impossible-plan"


class ConfigError(InputError):
    """`training_config.yaml` or `inference_config.yaml` asks for something unknown, or that cannot be done."""

    code = "invalid-training-config"
    job_exit_code = 10


class DatasetError(InputError):
    """The dataset cannot be fetched, read, or used for training."""

    code = "invalid-dataset"
    job_exit_code = 11


class WeightsError(InputError):
    """The base model's weights cannot be had, or are not what the preset says."""

    code = "invalid-weights"
    job_exit_code = 12


class ImageError(InputError):
    """An image reference that cannot be used, or that points at nothing."""

    code = "invalid-image"
    job_exit_code = 17


class DiskFullError(InputError):
    """No room is left on the disk."""

    code = "disk-full"
    job_exit_code = 15


class PortTakenError(InputError):
    """Another process listens on the port."""

    code = "port-taken"
    job_exit_code = 18


class AccessError(InputError):
    """A registry or an API server knows the caller, or not, and says no."""

    code = "access-denied"
    job_exit_code = 19


class RunError(KaitoFlowsError):
    """The input was right, and the run failed all the same."""

    code = "run-failed"


class OutOfMemoryError(RunError):
    """The machine or the GPU has too little memory."""

    code = "out-of-memory"
    job_exit_code = 13


class DivergedError(RunError):
    """The loss is no longer a finite number."""

    code = "diverged"
    job_exit_code = 14


class UnprovenError(RunError):
    """The adapter was not shown to change every target module, or to be better than the base model."""

    code = "unproven-adapter"
    job_exit_code = 16


class PreemptedError(RunError):
    """The job was told to stop (SIGTERM) and saved a checkpoint; it goes on from there when started again."""

    code = "preempted"
    job_exit_code = 143
    retryable = True


class KilledError(RunError):
    """A job's process was killed from outside; it goes on from its last checkpoint when started again."""

    code = "job-killed"
    job_exit_code = 137
    retryable = True


class JobError(RunError):
    """A job ended in a way that has no class of its own."""

    code = "job-failed"


class ServiceError(RunError):
    """A service did not come up, or does not answer."""

    code = "service-unavailable"


class RegistryError(RunError):
    """A registry does not answer, or not as the distribution spec says."""

    code = "registry-unavailable"
    job_exit_code = 20
    retryable = True


class ClusterError(RunError):
    """The Kubernetes API does not answer."""

    code = "cluster-unavailable"
    retryable = True


class SchedulingError(RunError):
    """No node takes the pod."""

    code = "unschedulable"


class CapacityError(SchedulingError):
    """A node that was to be rented cannot be had now: no quota, no capacity, not offered, or it did not come up."""

    code = "no-capacity"


class CloudError(RunError):
    """A cloud's API does not answer, or fails."""

    code = "cloud-unavailable"
    retryable = True


class LeaseLostError(RunError):
    """The nodes of a lease are no longer the run's: it has run out, or somebody has taken them away."""

    code = "lease-lost"
    retryable = True


class BudgetError(RunError):
    """The run's nodes have cost as much as they may."""

    code = "over-budget"


class ImagePullError(RunError):
    """The image of a container cannot be pulled."""

    code = "image-pull-failed"


class DeadlineError(RunError):
    """It took longer than it may."""

    code = "deadline-exceeded"


def _classes(root: type[KaitoFlowsError]) -> Iterator[type[KaitoFlowsError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def from_job_exit(exit_code: int, message: str, *, code: str = "", place: str = "", hint: str = "") -> KaitoFlowsError:
    """Return the error that a job's exit code stands for: the class with that `job_exit_code`, else `JobError`."""
    for cls in _classes(KaitoFlowsError):
        if cls.job_exit_code == exit_code and cls.job_exit_code not in (0, 1) and cls is not WorkspaceError:
            return cls(message, place=place, hint=hint, code=code)
    return JobError(message, place=place, hint=hint, code=code)


_NAMED = re.compile(r"(?:^|: )(\w+): ([a-z][a-z-]*): (.+)", re.DOTALL)


def from_text(text: str) -> KaitoFlowsError | None:
    """Return the error that Prefect keeps of a run, `Flow run encountered an exception: RunError: code: …`, or None."""
    found = _NAMED.search(text)
    cls = next((cls for cls in _classes(KaitoFlowsError) if found and cls.__name__ == found[1]), None)
    if found is None or cls is None:
        return None
    return (InputError if cls is WorkspaceError else cls)(found[3], code=found[2])


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" inside the block into `DiskFullError` naming `path`."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                "no space left on device", place=str(path), hint="free some space, or set KAITO_FLOWS_HOME elsewhere"
            ) from exc
        raise
