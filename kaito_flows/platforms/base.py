"""What every platform can do: run a job to its end, keep a service up, remember a Workspace's status.

A job is a program of `containers/` with one argument, its job file. It prints one JSON object a line (`Event`) and ends
with an exit code that `kaito_flows.errors` knows. Jobs and services have names computed from what they are for; to
`ensure` one means to create it, or to take up the one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kaito_flows.oci.layout import Layout

Event = dict[str, Any]
"""One line that a job printed: `event` says of which kind, the other keys are its facts."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job: its name, its program, what its job file says, and what lies under its root before it starts.

    `files` and `links` map paths relative to the root (`mnt/config/training_config.yaml`) to a text, or to a folder
    that appears there (`workspace/weights`).
    """

    name: str
    workspace: str
    program: str
    arguments: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A service: a job that stays up; `revision` names what it serves, and a new one replaces the old."""

    job: JobSpec
    revision: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """A service that is up: where it answers, and which models it knows (the base first)."""

    workspace: str
    url: str
    models: tuple[str, ...]
    revision: str
    adopted: bool


class Platform(Protocol):
    """Runs jobs and services; flows and tasks do not know which platform they have."""

    def repository(self, image: str) -> Layout:
        """Return the repository that an image reference of a Workspace names.

        Raises:
            ImageError: it is no image reference.
        """
        ...

    @property
    def downloads(self) -> Path:
        """Where downloaded data is kept between runs."""
        ...

    def free_bytes(self) -> int:
        """Bytes that are free where this platform keeps its files."""
        ...

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Run the job to its end, or follow the one that already runs; return its `completed` event.

        Raises:
            KaitoFlowsError: the class that its exit code stands for.
        """
        ...

    def ensure_weights(self, preset: str, source: Mapping[str, Any], on_event: Callable[[Event], None]) -> Path:
        """Return a folder with the preset's tokenizer and, where jobs run on this machine, its weights.

        Raises:
            WeightsError: the source cannot be had, or is not what the preset says.
        """
        ...

    def has_weights(self, preset: str, source: Mapping[str, Any]) -> bool:
        """Whether `ensure_weights` has nothing to do."""
        ...

    def forget_job(self, spec: JobSpec) -> None:
        """Remove what a job left, unless it runs again; what it published stays."""
        ...

    def stop_jobs(self, workspace: str) -> list[str]:
        """Stop every job of the workspace that still runs; return their names."""
        ...

    def check_service(self, workspace: str, port: int | None) -> None:
        """Say early that a service could not listen where it is wished for.

        Raises:
            PortTakenError: another process listens on the port.
            InputError: the address is not to be had.
        """
        ...

    def ensure_service(self, spec: ServiceSpec, probe: Callable[[Service], None]) -> Service:
        """Bring the service up and hand it to `probe`; the old revision stays until `probe` is satisfied.

        Raises:
            ServiceError: it did not come up.
            PortTakenError: somebody else listens on the port.
        """
        ...

    def service(self, workspace: str) -> Service | None:
        """The workspace's service, if it is up."""
        ...

    def read_status(self, workspace: str) -> Event | None:
        """What was last written of the workspace."""
        ...

    def write_status(self, workspace: str, status: Mapping[str, Any]) -> None:
        """Remember the status of the workspace."""
        ...

    def check_known(self, workspace: str) -> None:
        """Raise if the workspace was deleted: who still works for it is to stop.

        Raises:
            RunError: (code `workspace-deleted`) nothing is known of it.
        """
        ...

    def delete(self, workspace: str) -> list[str]:
        """Stop everything of the workspace and forget it; return what was stopped. Images stay."""
        ...
