"""The cluster and the Docker engine that the tests of manifests and images take, where there are some."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_fixtures import missing
from kubectl_fixtures import Kubectl
from pod_fixtures import IMAGE_TAG

from kaito_flows.cluster.gateway import Cluster

WORKER_IMAGE = f"kaito-flows/worker:{IMAGE_TAG}"


class Installer(Kubectl):
    """`kubectl`, which renders and applies manifests."""

    def apply(self, manifests: list[dict[str, Any]], *options: str) -> str:
        """`kubectl apply` of manifests."""
        return self("apply", *options, "--filename", "-", stdin=yaml.safe_dump_all(manifests))

    def kustomize(self, folder: Path) -> list[dict[str, Any]]:
        """The manifests that a folder renders to."""
        return [document for document in yaml.safe_load_all(self("kustomize", str(folder))) if document]


@pytest.fixture(scope="session")
def renderer() -> Installer:
    """`kubectl`, for what it does without a cluster."""
    folder = os.environ.get("KUBE_BIN")
    program = shutil.which("kubectl") or (shutil.which("kubectl", path=folder) if folder else None)
    return Installer(program or missing("kubectl, on the PATH or in KUBE_BIN"), "default")


@pytest.fixture(scope="module")
def target(renderer: Installer, kubeconfig: Path) -> Iterator[Installer]:
    """`kubectl` with a namespace of the module's own, which is gone with all that it holds afterwards."""
    own = Installer(renderer.program, f"images-{secrets.token_hex(4)}")
    own("create", "namespace", own.namespace)
    try:
        yield own
    finally:
        own("delete", "namespace", own.namespace, "--wait=false")
        for kind in ("clusterrole", "clusterrolebinding"):
            own("delete", kind, "--selector", f"test={own.namespace}")


def moved(manifests: list[dict[str, Any]], namespace: str) -> list[dict[str, Any]]:
    """The manifests of the base, in another namespace than theirs, and without the CRD and the namespace itself."""
    text = json.dumps([m for m in manifests if m["kind"] not in ("Namespace", "CustomResourceDefinition")])
    found: list[dict[str, Any]] = json.loads(text.replace('"namespace": "kaito-flows"', f'"namespace": "{namespace}"'))
    for manifest in found:
        if manifest["kind"].startswith("ClusterRole"):
            manifest["metadata"] |= {
                "name": f"{manifest['metadata']['name']}-{namespace}",
                "labels": {"test": namespace},
            }
        if "roleRef" in manifest and manifest["roleRef"]["kind"] == "ClusterRole":
            manifest["roleRef"]["name"] += f"-{namespace}"
    return found


@pytest.fixture(scope="module")
def base(renderer: Installer) -> list[dict[str, Any]]:
    """The base as the test cluster gets it."""
    found = renderer.kustomize(Path(__file__).parent / "overlay")
    tagged: list[dict[str, Any]] = json.loads(json.dumps(found).replace("kaito-flows/worker:dev", WORKER_IMAGE))
    return tagged


@pytest.fixture(scope="module")
def here(target: Installer, base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The base, in the namespace of the module's own."""
    return moved(base, target.namespace)


@pytest.fixture(scope="module")
def installed(target: Installer, here: list[dict[str, Any]], repository_root: Path) -> Installer:
    """A cluster with the accounts and rights of the base and of a namespace with Workspaces, both in one."""
    rights = [m for m in here if m["kind"] == "ServiceAccount" or "rules" in m or "roleRef" in m]
    rights += moved(target.kustomize(repository_root / "deployments/kubernetes/workspaces"), target.namespace)
    target.apply(rights)
    return target


@pytest.fixture(scope="module")
def allowed(installed: Installer, cluster: Cluster, repository_root: Path) -> Iterator[Installer]:
    """A cluster with the rights for Karpenter, for the accounts of the module's own namespace."""
    events = f"claim-events-{installed.namespace}"
    for manifest in moved(
        installed.kustomize(repository_root / "deployments/kubernetes/karpenter"), installed.namespace
    ):
        if manifest["metadata"].get("namespace") == "default":
            manifest["metadata"]["name"] = events
            if "roleRef" in manifest:
                manifest["roleRef"]["name"] = events
        cluster.apply(manifest)
    yield installed
    for kind in ("Role", "RoleBinding"):
        cluster.within("default").delete(kind, events)


@pytest.fixture(scope="session")
def docker() -> str:
    """Docker's command, with an engine that has the images (`.ci/images` builds them)."""
    for program in (os.environ.get("DOCKER", "docker"), "/usr/bin/docker"):
        if (
            shutil.which(program)
            and subprocess.run([program, "info"], capture_output=True, check=False).returncode == 0
        ):
            break
    else:
        missing("a Docker engine")
    image = f"kaito-flows/tuner:{IMAGE_TAG}"
    if subprocess.run([program, "image", "inspect", image], capture_output=True, check=False).returncode != 0:
        missing(f"the images: containers/build --tag {IMAGE_TAG}")
    return program
