"""What tests with real pods share: a registry that pods reach, our images, and a namespace with a Secret."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_fixtures import missing
from kubectl_fixtures import Kubectl, own_namespace
from registry_fixtures import Registry, make_registry

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image
from kaito_flows.oci.registry import RegistryRepository

WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")
IMAGE_TAG = os.environ.get("KAITO_FLOWS_TEST_TAG", "dev")
PUSH_SECRET = "push"


@pytest.fixture(scope="session")
def pod_host(cluster: Cluster) -> str:
    """An address of this machine that pods reach: `KAITO_FLOWS_TEST_HOST`, or the node's if that is this machine."""
    if host := os.environ.get("KAITO_FLOWS_TEST_HOST"):
        return host
    nodes = cluster.list("Node")
    addresses = [
        a["address"] for node in nodes for a in node["status"].get("addresses", ()) if a["type"] == "InternalIP"
    ]
    for address in addresses:
        with socket.socket() as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return str(address)
    return str(missing("an address of this machine that pods reach: set KAITO_FLOWS_TEST_HOST"))


@pytest.fixture(scope="session")
def pod_registry(pod_host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry with a password, where pods and this machine both reach it."""
    with make_registry(tmp_path_factory.mktemp("pod-registry"), pod_host) as registry:
        yield registry


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> dict[str, str]:
    """The names of our images, which the nodes must have."""
    have = {
        name
        for node in cluster.list("Node")
        for image in node["status"].get("images") or []
        for name in image.get("names") or []
    }
    found = {}
    for program in ("tuner", "server", "worker"):
        image = f"kaito-flows/{program}:{IMAGE_TAG}"
        if not any(name.endswith(image) for name in have):
            missing(f"the image {image} on the cluster's nodes")
        found[program] = image
    return found


@dataclass(frozen=True)
class Place:
    """A namespace with the Secret `push` for the registry, and settings that lead there."""

    kubectl: Kubectl
    cluster: Cluster
    registry: Registry

    @property
    def namespace(self) -> str:
        return self.kubectl.namespace

    def image(self, name: str) -> str:
        """An image reference in the registry."""
        return f"{self.registry.host}/{self.namespace}/{name}:latest"


@pytest.fixture
def place(
    kubectl: Kubectl,
    cluster: Cluster,
    pod_registry: Registry,
    images: dict[str, str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """A namespace of the test's own on the cluster, with the settings of a worker that runs there."""
    return make_place(kubectl, cluster, pod_registry, images, monkeypatch)


@pytest.fixture(scope="module")
def shared_place(
    workspaces_crd: str,
    cluster: Cluster,
    pod_registry: Registry,
    images: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Place]:
    """As `place`, for all tests of a module: `<NAMESPACE of the module>-<random>`, with weights kept on the node."""
    with pytest.MonkeyPatch.context() as patch, own_namespace(workspaces_crd, request.module.NAMESPACE) as kubectl:
        patch.setenv("KAITO_FLOWS_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("KAITO_FLOWS_WEIGHTS_CACHE", f"node:{node_folder(tmp_path_factory.mktemp('weights'))}")
        yield make_place(kubectl, cluster, pod_registry, images, patch)


def node_folder(folder: Path) -> Path:
    """Let pods of any user write into a folder of this machine, which is the node: see `pod_host`."""
    folder.chmod(0o1777)
    return folder


def make_place(
    kubectl: Kubectl,
    cluster: Cluster,
    pod_registry: Registry,
    images: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    """Set the settings of a worker that runs in the namespace, and make the Secret `push` there."""
    settings = {
        "PLATFORM": "kubernetes",
        "NAMESPACE": kubectl.namespace,
        "TUNER_IMAGE": images["tuner"],
        "SERVER_IMAGE": images["server"],
        "WORKER_IMAGE": images["worker"],
        "INSECURE_REGISTRIES": pod_registry.host,
        "JOB_CPU": "50m",
        "JOB_MEMORY": "256Mi",
        "CHECKPOINT_SECONDS": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"KAITO_FLOWS_{name}", value)
    kubectl("apply", "-f", "-", stdin=push_secret(pod_registry))
    return Place(kubectl, cluster.within(kubectl.namespace), pod_registry)


def push_secret(registry: Registry) -> dict[str, Any]:
    """The Secret `push` with the login of a registry."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": PUSH_SECRET},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": base64.b64encode(registry.dockerconfig).decode()},
    }


def pod_repository(place: Place, name: str) -> RegistryRepository:
    """A repository of the namespace's in the registry."""
    credentials = Credentials.from_dockerconfig(place.registry.dockerconfig)
    return RegistryRepository(place.registry.host, f"{place.namespace}/{name}", credentials)


def chats(rows: int = 48) -> bytes:
    """A small dataset, a chat a line."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Say {WORDS[i % 8]} {i}."},
                    {"role": "assistant", "content": f"{WORDS[i % 8]} {i}"},
                ]
            }
        )
        for i in range(rows)
    ]
    return ("\n".join(lines) + "\n").encode()


def chats_image(place: Place, rows: int = 48) -> str:
    """Push an image with a small dataset, and return its reference."""
    return push_image(place, "chats", {"data/chats.jsonl": chats(rows)})


def push_image(place: Place, name: str, files: Mapping[str, bytes | Path]) -> str:
    """Push an image with one layer, and return its reference."""
    # This process speaks to the registry as pods do.
    os.environ["KAITO_FLOWS_INSECURE_REGISTRIES"] = place.registry.host
    build_image(pod_repository(place, name), [dict(files)], annotations={}, tag="latest")
    return place.image(name)


def workspace(place: Place, name: str, data: str, *, config: str = "", **changes: Any) -> dict[str, Any]:
    """A Workspace that tunes the tiny model on the cluster."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": place.namespace, **changes.pop("metadata", {})},
        "resource": {"labelSelector": {"matchLabels": {"kubernetes.io/os": "linux"}}, **changes.pop("resource", {})},
        "tuning": {
            "preset": {"name": "tiny-phi-3"},
            "method": "lora",
            **({"config": config} if config else {}),
            "input": {"image": data, "imagePullSecrets": [PUSH_SECRET]},
            "output": {"image": place.image(name), "imagePushSecret": PUSH_SECRET},
            **changes.pop("tuning", {}),
        },
    }


def training_config(place: Place, name: str = "training", dtype: str = "bfloat16", **arguments: Any) -> str:
    """Apply a ConfigMap with few, quick steps, and return its name."""
    given = {"max_steps": 8, "learning_rate": 0.01, "max_length": 128, "save_steps": 2, "logging_steps": 1, **arguments}
    sections = {
        "ModelConfig": {"torch_dtype": dtype},
        "TrainingArguments": given,
        "DatasetConfig": {"train_test_split": 0.8},
    }
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"training_config.yaml": json.dumps({"training_config": sections})},
    }
    place.kubectl("apply", "-f", "-", stdin=manifest)
    return name


def unique(prefix: str) -> str:
    """A name that no other test has."""
    return f"{prefix}-{secrets.token_hex(3)}"
