"""`kubectl` for tests: what a user types, in a namespace of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import missing


class Kubectl:
    """The command `kubectl`, in one namespace."""

    def __init__(self, program: str, namespace: str) -> None:
        self.program = program
        self.namespace = namespace

    def run(self, *arguments: str, stdin: Any = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is; what is no text on `stdin` is written as JSON."""
        text = stdin if stdin is None or isinstance(stdin, str) else json.dumps(stdin)
        command = [self.program, "--namespace", self.namespace, *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)

    def __call__(self, *arguments: str, stdin: Any = None) -> str:
        """Run it, and see that it succeeds."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get -o json`."""
        found: dict[str, Any] = json.loads(self("get", "-o", "json", *arguments))
        return found


@pytest.fixture(scope="session")
def workspaces_crd(repository_root: Path) -> str:
    """A cluster that knows Workspaces, by the file in `deployments/`; returns the program `kubectl`."""
    folder = os.environ.get("KUBE_BIN")
    program = shutil.which("kubectl") or (shutil.which("kubectl", path=folder) if folder else None)
    if not os.environ.get("KUBECONFIG") or program is None:
        missing("a Kubernetes: KUBECONFIG, and kubectl on the PATH")
    kubectl = Kubectl(program, "default")
    kubectl("apply", "-f", str(repository_root / "deployments/kubernetes/base/crd.yaml"))
    kubectl("wait", "--for=condition=Established", "crd/workspaces.kaito.sh", "--timeout=30s")
    return program


@pytest.fixture
def kubectl(workspaces_crd: str) -> Iterator[Kubectl]:
    """`kubectl` in a namespace of the test's own, which is gone with all that it holds when the test is over."""
    with own_namespace(workspaces_crd, "test") as kubectl:
        yield kubectl


@contextlib.contextmanager
def own_namespace(program: str, prefix: str) -> Iterator[Kubectl]:
    """`kubectl` in a namespace that is gone, with all that it holds, after the block."""
    kubectl = Kubectl(program, f"{prefix}-{secrets.token_hex(4)}")
    kubectl("create", "namespace", kubectl.namespace)
    try:
        yield kubectl
    finally:
        for item in kubectl.get("workspaces")["items"]:
            name = item["metadata"]["name"]
            kubectl.run("patch", "workspace", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
        kubectl("delete", "namespace", kubectl.namespace, "--wait=false")
