"""A real registry for tests: Debian's, with a user and a password."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import program


@dataclass(frozen=True)
class Registry:
    """A registry that runs: `host` (with its port), a user who may do everything, and where its blobs lie.

    `dockerconfig` holds the login as a Secret `.dockerconfigjson` does; `config_folder` is for `DOCKER_CONFIG`.
    """

    host: str
    user: str
    password: str
    dockerconfig: bytes
    config_folder: Path
    storage: Path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry on this machine, with a user and a password."""
    with make_registry(tmp_path_factory.mktemp("docker-registry")) as registry:
        yield registry


@contextlib.contextmanager
def make_registry(folder: Path, address: str = "127.0.0.1") -> Iterator[Registry]:
    """Run a registry with a user and a password while the block lasts, in a folder and on an address."""
    user, password = "jane", "with:colon"
    # The bcrypt hash of the password: to make one takes a program of its own.
    (folder / "htpasswd").write_text(f"{user}:$2y$05$r1bLO1nv/Bfxo6EGz6dWD.qDqFbOIZl7eIIK27Zp/FN/0XlqoRN3u\n")
    auth = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    with run_registry(folder, auth, address=address) as host:
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        dockerconfig = json.dumps({"auths": {host: {"auth": login}}}).encode()
        (folder / "docker").mkdir()
        (folder / "docker" / "config.json").write_bytes(dockerconfig)
        yield Registry(host, user, password, dockerconfig, folder / "docker", folder / "storage")


@pytest.fixture
def registry_with(tmp_path: Path) -> Callable[[dict[str, object]], contextlib.AbstractContextManager[str]]:
    """Run a registry of the test's own, with the `auth` section that it is called with."""
    return lambda auth: run_registry(tmp_path, auth)


@contextlib.contextmanager
def run_registry(
    folder: Path, auth: dict[str, object], *, delete: bool = True, address: str = "127.0.0.1"
) -> Iterator[str]:
    """Run Debian's registry in a folder while the block lasts, and give its host and port."""
    binary = program("docker-registry", "docker-registry")
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    config = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": delete}},
        "http": {"addr": f"{address}:{port}"},
        "auth": auth,
    }
    (folder / "config.yml").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        _wait_for(address, port, process, folder / "log")
        yield f"{address}:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"the registry does not listen: {log.read_text()}")
