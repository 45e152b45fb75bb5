"""A real Kubernetes for tests: the one that KUBECONFIG names, a namespace a module, and a line that can be cut."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
import yaml

from kaito_flows.cluster.gateway import Cluster

BUSYBOX = "kube-dev/busybox:1"


def missing(what: str) -> NoReturn:
    """Skip the test for want of something; in CI everything must be there, and it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """The kubeconfig of the cluster that tests may use."""
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        missing("a Kubernetes: set KUBECONFIG")
    return Path(path)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Cluster:
    """The cluster, in the namespace that its context names; tests make their objects in `space`."""
    return Cluster.connect(patience_seconds=60)


@pytest.fixture(scope="session")
def busybox(cluster: Cluster) -> str:
    """An image with a shell and the usual small programs: one that the nodes have, if they do."""
    images = [image for node in cluster.list("Node") for image in node["status"].get("images") or []]
    names = [name for image in images for name in image.get("names") or []]
    return BUSYBOX if any(name.endswith(BUSYBOX) for name in names) else "busybox:1.36"


@pytest.fixture(scope="module")
def space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster in a namespace of the module's own: `<NAMESPACE of the module, or kaito-flows>-<random>`."""
    name = f"{getattr(request.module, 'NAMESPACE', 'kaito-flows')}-{secrets.token_hex(3)}"
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    try:
        space = cluster.within(name)
        # Pods are refused until the controllers have made it.
        for event, _ in space.watch("ServiceAccount", name="default", timeout_seconds=30):
            if event == "ADDED":
                break
        yield space
    finally:
        cluster.delete("Namespace", name)


class Proxy:
    """A line to the API server that can be cut and mended."""

    def __init__(self, server: str) -> None:
        url = urlsplit(server)
        self._target = (url.hostname or "", url.port or 443)
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self.port = 0
        self.connections = 0
        self.mend()

    def mend(self) -> None:
        """Take connections (again)."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def drop(self) -> None:
        """Break every connection; new ones are taken."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            self._open.clear()

    def cut(self) -> None:
        """Break every connection, and take no more."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.drop()

    def cut_for(self, seconds: float) -> threading.Thread:
        """Cut the line, and mend it after a while, from another thread."""

        def outage() -> None:
            self.cut()
            time.sleep(seconds)
            self.mend()

        thread = threading.Thread(target=outage, daemon=True)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def kubeconfig(self, original: Path, folder: Path) -> Path:
        """Write a kubeconfig that leads through the proxy."""
        config: dict[str, Any] = yaml.safe_load(original.read_text())
        for item in config["clusters"]:
            item["cluster"]["tls-server-name"] = self._target[0]
            item["cluster"]["server"] = f"https://127.0.0.1:{self.port}"
        path = folder / "through-proxy.yaml"
        path.write_text(yaml.safe_dump(config))
        return path


@pytest.fixture
def proxy(cluster: Cluster, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A line to the API server; KUBECONFIG leads through it for the test."""
    line = Proxy(cluster.connection.server)
    monkeypatch.setenv("KUBECONFIG", str(line.kubeconfig(kubeconfig, tmp_path)))
    yield line
    line.cut()
