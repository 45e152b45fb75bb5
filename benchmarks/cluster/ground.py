"""What a measurement stands on, all of it its own: a namespace, a registry, a Prefect server, and a record of pods.

It is built of the same parts as the tests on a cluster, so it needs what they need: KUBECONFIG, kubectl on the PATH,
our images on the nodes under the tag KAITO_FLOWS_TEST_TAG, Debian's `docker-registry`, and an address of this machine
that pods reach (KAITO_FLOWS_TEST_HOST, where it is not the node's own).
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import httpx

from kaito_flows.cluster.gateway import Cluster

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from deployments.conftest import Installer, moved  # noqa: E402
from pod_fixtures import PUSH_SECRET, Place, chats_image, training_config, workspace  # noqa: E402
from registry_fixtures import Registry, make_registry  # noqa: E402

__all__ = [
    "ROOT",
    "TAG",
    "Ground",
    "Object",
    "Prefect",
    "Recorder",
    "chats_image",
    "ground",
    "median",
    "prefect_server",
    "rights",
    "running",
    "say",
    "surroundings",
    "training_config",
    "wait_for",
    "workspace",
]

BIN = Path(sys.executable).parent
TAG = os.environ.get("KAITO_FLOWS_TEST_TAG", "dev")
Object = dict[str, Any]
T = TypeVar("T")


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def median(values: list[float]) -> float:
    """The middle one."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def surroundings(here: Ground) -> str:
    """What was measured, when and on what, as one line."""
    [node, *_] = here.cluster.list("Node")
    about = node["status"]["nodeInfo"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("kaito-flows", "prefect", "kopf"))
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"{time.strftime('%Y-%m-%d %H:%M %Z')}: {load}, Kubernetes {about['kubeletVersion']}, {versions}"


def wait_for(look: Callable[[], T | None], seconds: float, what: str, every: float = 0.02) -> T:
    """Return what `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {seconds:.0f} s: {what}")
        time.sleep(every)
    return found


@dataclass(frozen=True)
class Ground(Place):
    """A namespace of its own with the Secret `push` for a registry of its own, and a folder for what is written."""

    folder: Path
    host: str

    @property
    def installer(self) -> Installer:
        """`kubectl` in the namespace, which renders and applies manifests."""
        assert isinstance(self.kubectl, Installer)
        return self.kubectl

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository of the registry."""
        login = (self.registry.user, self.registry.password)
        answer = httpx.get(f"http://{self.registry.host}/v2/{self.namespace}/{repository}/tags/list", auth=login)
        return list(answer.json().get("tags") or ()) if answer.status_code == 200 else []

    def settings(self) -> dict[str, str]:
        """The settings of flow runs, as environment variables."""
        return {
            "KAITO_FLOWS_PLATFORM": "kubernetes",
            "KAITO_FLOWS_WORKER_IMAGE": f"kaito-flows/worker:{TAG}",
            "KAITO_FLOWS_TUNER_IMAGE": f"kaito-flows/tuner:{TAG}",
            "KAITO_FLOWS_SERVER_IMAGE": f"kaito-flows/server:{TAG}",
            "KAITO_FLOWS_INSECURE_REGISTRIES": self.registry.host,
            "KAITO_FLOWS_JOB_CPU": "50m",
            "KAITO_FLOWS_JOB_MEMORY": "256Mi",
        }


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """Make the namespace and start the registry; nothing of it is left afterwards, nor after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster.connect(patience_seconds=60)
    host = os.environ.get("KAITO_FLOWS_TEST_HOST") or _address(cluster)
    program = shutil.which("kubectl")
    if program is None:
        raise SystemExit("kubectl is not on the PATH")
    kubectl = Installer(program, f"bench-{secrets.token_hex(3)}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kaito-flows-bench-")))
        folder.chmod(0o755)
        (folder / "registry").mkdir()
        registry = stack.enter_context(make_registry(folder / "registry", host))
        os.environ["KAITO_FLOWS_INSECURE_REGISTRIES"] = registry.host
        kubectl("apply", "--filename", str(ROOT / "deployments/kubernetes/base/crd.yaml"))
        kubectl("wait", "--for=condition=Established", "crd/workspaces.kaito.sh", "--timeout=30s")
        kubectl("create", "namespace", kubectl.namespace)
        stack.callback(_remove, kubectl)
        kubectl("apply", "--filename", "-", stdin=_login(registry))
        yield Ground(kubectl, cluster.within(kubectl.namespace), registry, folder, host)


def _address(cluster: Cluster) -> str:
    for node in cluster.list("Node"):
        for address in node["status"]["addresses"]:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind((address["address"], 0))
                return str(address["address"])
    raise SystemExit("set KAITO_FLOWS_TEST_HOST to an address of this machine that pods reach")


def _login(registry: Registry) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": PUSH_SECRET},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": base64.b64encode(registry.dockerconfig).decode()},
    }


def _remove(kubectl: Installer) -> None:
    for item in kubectl.get("workspaces")["items"]:
        name = item["metadata"]["name"]
        kubectl.run("patch", "workspace", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    kubectl("delete", "namespace", kubectl.namespace, "--wait=false")
    for kind in ("clusterrole", "clusterrolebinding"):
        kubectl("delete", kind, "--selector", f"test={kubectl.namespace}")


def rights(here: Ground) -> list[Object]:
    """Apply the accounts and rights of the base and of a namespace with Workspaces; return the rest of the base."""
    base = moved(here.installer.kustomize(ROOT / "tests/deployments/overlay"), here.namespace)
    own = [m for m in base if m["kind"] == "ServiceAccount" or "rules" in m or "roleRef" in m]
    own += moved(here.installer.kustomize(ROOT / "deployments/kubernetes/workspaces"), here.namespace)
    here.installer.apply([m for m in own if m["kind"] != "NetworkPolicy"])
    return [m for m in base if m["kind"] in ("ConfigMap", "Deployment")]


@dataclass(frozen=True)
class Prefect:
    """A Prefect server that runs."""

    url: str

    def ask(self, path: str, **body: Any) -> Any:
        """POST, and return the answer; a server on SQLite says at times that it is busy."""
        for _ in range(20):
            response = httpx.post(f"{self.url}/{path}", json=body, timeout=60)
            if response.status_code != 503:
                break
            time.sleep(0.5)
        response.raise_for_status()
        return response.json()

    def read(self, path: str) -> Any:
        """GET, and return the answer."""
        response = httpx.get(f"{self.url}/{path}", timeout=60)
        response.raise_for_status()
        return response.json()


@contextlib.contextmanager
def prefect_server(here: Ground, *, postgresql: bool = False) -> Iterator[Prefect]:
    """Run a Prefect server that pods reach, on SQLite or on a PostgreSQL of its own."""
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, "PREFECT_HOME": str(here.folder / "prefect"), "DO_NOT_TRACK": "1"}
        environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
        if postgresql:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = stack.enter_context(_postgresql(here.folder))
        with socket.socket() as probe:
            probe.bind((here.host, 0))
            port = probe.getsockname()[1]
        url = environment["PREFECT_API_URL"] = f"http://{here.host}:{port}/api"
        command = [str(BIN / "prefect"), "server", "start", "--host", here.host, "--port", str(port)]
        stack.enter_context(running(command, environment, here.folder / "prefect-server.log"))
        wait_for(lambda: _answers(url), 180, "Prefect's server answers", every=0.3)
        yield Prefect(url)


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the block lasts."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=log.parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL (Debian's `postgresql`) and give its URL; as root it is run by the user `postgres`."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise SystemExit("PostgreSQL is not installed: apt-get install postgresql")
    data = folder / "postgresql"
    data.mkdir()
    asuser = []
    if os.getuid() == 0:
        shutil.chown(data, "postgres")
        asuser = ["runuser", "-u", "postgres", "--"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    initdb = [*asuser, str(programs[-1] / "initdb"), "--auth=trust", "--username=prefect", "--no-sync", str(data)]
    subprocess.run(initdb, check=True, capture_output=True, cwd=data)
    options = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(data), "-c", "fsync=off"]
    with running([*asuser, str(programs[-1] / "postgres"), *options], dict(os.environ), folder / "postgresql.log"):
        wait_for(lambda: _listens(port), 30, "PostgreSQL listens")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"


def _answers(url: str) -> bool | None:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200 or None
    except httpx.TransportError:
        return None


def _listens(port: int) -> bool | None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return None


class Recorder:
    """What happens to objects of a kind in the namespace, with the time at which it was seen."""

    def __init__(self, cluster: Cluster, *kinds: str) -> None:
        self.seen: list[tuple[float, str, Object]] = []
        for kind in kinds:
            threading.Thread(target=self._record, args=(cluster, kind), daemon=True).start()

    def _record(self, cluster: Cluster, kind: str) -> None:
        for event, found in cluster.watch(kind):
            self.seen.append((time.time(), event, found))

    def first(self, kind: str, is_it: Callable[[Object], bool], since: float = 0.0) -> tuple[float, Object] | None:
        """When an object of the kind was first seen as wished for, and how it was."""
        for moment, event, found in list(self.seen):
            if moment >= since and found["kind"] == kind and event != "DELETED" and is_it(found):
                return moment, found
        return None

    def there(self, kind: str) -> dict[str, Object]:
        """The objects of the kind that are there now, by name."""
        found: dict[str, Object] = {}
        for _, event, item in list(self.seen):
            if item["kind"] == kind:
                if event == "DELETED":
                    found.pop(item["metadata"]["name"], None)
                else:
                    found[item["metadata"]["name"]] = item
        return found
