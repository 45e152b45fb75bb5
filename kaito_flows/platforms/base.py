"""What every platform can do: run a job to its end, keep a service up, remember a Workspace's status.

A job is a program of `containers/` with one argument, its job file. It prints one JSON object a line (`Event`) and ends
with an exit code that `kaito_flows.errors` knows. Jobs and services have names computed from what they are for; to
`ensure` one means to create it, or to take up the one that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from kaito_flows.oci.repository import Repository
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.status import WorkspaceStatus

Event = dict[str, Any]
"""One line that a job printed: `event` says of which kind, the other keys are its facts."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A base model: its preset's name, where it comes from, how large, and the Secrets that open the place.

    `secret` is the one with `HF_TOKEN`, `pull_secrets` are those for an image's registry. A job that has a base model
    finds it at `workspace/weights` under its root.
    """

    preset: str
    source: Mapping[str, Any]
    bytes: int
    secret: str = ""
    pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a job or service runs: on one of `nodes` (none: on any), in `count` pods with `gpus` GPUs each."""

    nodes: tuple[str, ...] = ()
    gpus: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job: its name, its program, what its job file says, and what lies under its root before it starts.

    `files` maps paths relative to the root (`mnt/config/training_config.yaml`) to texts. `secrets` names Secrets for
    registries, `volumes` maps absolute paths to Kubernetes volume sources, for reading unless `writes_volumes` says so;
    `memory` and `expected_seconds` are what the plan counts with: a job is the same with others.
    """

    name: str
    workspace: str
    program: str
    arguments: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None
    placement: Placement = Placement()
    secrets: tuple[str, ...] = ()
    volumes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    writes_volumes: bool = False
    memory: Mapping[str, int] | None = None
    expected_seconds: float | None = None

    def job_file(self, root: str) -> dict[str, Any]:
        """What the program is told, with its files under `root`."""
        return {**self.arguments, "root": root, **({"memory": dict(self.memory)} if self.memory else {})}


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A service: a job that stays up; `revision` names what it serves, and a new one replaces the old.

    `public` asks for an address outside of the cluster. With `template`, a pod template, the Workspace brings its own.
    """

    job: JobSpec
    revision: str
    port: int | None = None
    public: bool = False
    template: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """A service that is up: where it answers, which models it knows (the base first), and the nodes it is bound to."""

    workspace: str
    url: str
    models: tuple[str, ...]
    revision: str
    adopted: bool
    nodes: tuple[str, ...] = ()


class Platform(Protocol):
    """Runs jobs and services; flows and tasks do not know which platform they have."""

    kind: Literal["local", "kubernetes"]

    @property
    def namespace(self) -> str:
        """Where it makes things; "" where there are no namespaces."""
        ...

    def begin(self, workspace: Workspace) -> None:
        """Make the Workspace known, if it is not; what is made for it from now on belongs to it.

        Raises:
            RunError: (code `workspace-changed`) it was changed since this run was started.
        """
        ...

    def config_text(self, name: str, key: str) -> str | None:
        """Return what a ConfigMap that the Workspace names holds under the key; None where there are no ConfigMaps.

        Raises:
            InputError: (code `config-map-not-found`) no such ConfigMap, or no such key in it.
        """
        ...

    def check_secrets(self, names: Sequence[str], *, hub: str = "") -> None:
        """See that each Secret for a registry is there, and is one, and that the Secret `hub` holds `HF_TOKEN`.

        Raises:
            InputError: (codes `secret-not-found`, `invalid-secret`).
        """
        ...

    def check_output(self, workspace: str, image: str) -> None:
        """See that the tag to which the Workspace publishes is no other Workspace's.

        Raises:
            InputError: (code `output-taken`).
        """
        ...

    def repository(self, image: str, secrets: Sequence[str] = ()) -> Repository:
        """Return the repository that an image reference of a Workspace names, with what the Secrets say for it.

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

    def warm_up(self, workspace: str, nodes: Sequence[str], weights: Weights) -> None:
        """Let new nodes get the image of a job, and its weights where nodes keep them, before the job is there.

        It is not waited for, and nothing depends on it.
        """
        ...

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Run the job to its end, or follow the one that already runs; return its `completed` event.

        Raises:
            KaitoFlowsError: the class that its exit code stands for, or what became of its pod.
        """
        ...

    def ensure_weights(self, weights: Weights, on_event: Callable[[Event], None]) -> Path:
        """Return a folder with the model's tokenizer and, where jobs run on this machine, its weights.

        Raises:
            WeightsError: the source cannot be had, or is not what the preset says.
        """
        ...

    def has_weights(self, weights: Weights) -> bool:
        """Whether `ensure_weights` writes nothing large."""
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

    def ensure_service(
        self,
        spec: ServiceSpec,
        probe: Callable[[Service, httpx.Client], None],
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Service:
        """Bring the service up and hand it to `probe`; the old revision stays until `probe` is satisfied.

        `on_event` is told what it waits for.

        Raises:
            ServiceError: it did not come up.
            PortTakenError: somebody else listens on the port.
        """
        ...

    def serves(self, spec: ServiceSpec) -> bool:
        """Whether that very revision is up, wherever: it needs no other node."""
        ...

    def service(self, workspace: str) -> Service | None:
        """The workspace's service, if it is up."""
        ...

    def client(self, service: Service) -> httpx.Client:
        """An HTTP client whose base address is the service, from wherever this is called."""
        ...

    def read_status(self, workspace: str) -> WorkspaceStatus | None:
        """What was last written of the workspace."""
        ...

    def statuses(self) -> list[WorkspaceStatus]:
        """What was last written of every workspace, by name."""
        ...

    def watch_statuses(self, workspace: str = "") -> Iterator[WorkspaceStatus]:
        """Yield the status of one workspace or of all, and then again whenever one changes, without an end."""
        ...

    def write_status(self, status: WorkspaceStatus) -> None:
        """Remember the status of the workspace."""
        ...

    def record(self, workspace: str, reason: str, message: str, *, warning: bool = False) -> None:
        """Tell whoever looks at the workspace what happened to it, where there is a place for that."""
        ...

    def check_known(self, workspace: str) -> None:
        """Raise if the workspace was deleted or changed: who still works for it is to stop.

        Raises:
            RunError: (codes `workspace-deleted`, `workspace-changed`).
        """
        ...

    def delete(self, workspace: str) -> list[str]:
        """Stop everything of the workspace and forget it; return what was stopped. Images stay."""
        ...
