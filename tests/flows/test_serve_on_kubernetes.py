"""Serving on a real cluster: presets with adapters and pod templates come up, give way to the next, and stay."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from pod_fixtures import PUSH_SECRET, Place, push_image, unique
from safetensors.numpy import save

from kaito_flows.chat import ask
from kaito_flows.errors import ImageError, InputError, KaitoFlowsError
from kaito_flows.flows.serve_workspace import serve_workspace
from kaito_flows.platforms.kubernetes import KubernetesPlatform
from kaito_flows.settings import Settings
from kaito_flows.workspace import WorkspaceV1beta1

from .conftest import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]

NAMESPACE = "serving"
LENGTH = 512


def adapter_image(place: Place, name: str, seed: int, **changed: bytes) -> str:
    """Push an adapter for `tiny-phi-3` that changes every answer; `changed` replaces files, without their ending."""
    random = np.random.default_rng(seed)
    rank, shapes = 4, {"qkv_proj": (128, 256), "o_proj": (128, 128)}
    tensors = {}
    for layer in range(2):
        for module, (inner, outer) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = random.normal(0, 0.3, (rank, inner)).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = random.normal(0, 0.3, (outer, rank)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "kaito-flows/tiny-phi-3",
        "r": rank,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(shapes),
    }
    files = {
        "data/adapter_model.safetensors": changed.get("adapter_model", save(tensors)),
        "data/adapter_config.json": changed.get("adapter_config", json.dumps(config).encode()),
    }
    return push_image(place, name, files)


def inference(place: Place, name: str, **section: Any) -> dict[str, Any]:
    """A Workspace that serves on the cluster's own nodes, without a GPU."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": place.namespace, "annotations": {"kaito-flows/gpus": "0"}},
        "resource": {"labelSelector": {"matchLabels": {"kubernetes.io/os": "linux"}}},
        "inference": section,
    }


def adapter(name: str, image: str, **strength: str) -> dict[str, Any]:
    return {"source": {"name": name, "image": image, "imagePullSecrets": [PUSH_SECRET]}, **strength}


def config_map(place: Place, name: str, **vllm: Any) -> str:
    data = {"inference_config.yaml": json.dumps({"vllm": vllm})}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
    place.kubectl("apply", "-f", "-", stdin=manifest)
    return name


def serve(place: Place, document: dict[str, Any]) -> dict[str, Any]:
    """Apply the Workspace as a user does, and run the flow on it."""
    place.kubectl("apply", "-f", "-", stdin=document)
    facts: dict[str, Any] = serve_workspace(WorkspaceV1beta1.model_validate(document))
    return facts


def address(place: Place, name: str) -> str:
    """The Service's address in the cluster, once this node knows where it leads: it may take its proxy a second."""
    url = f"http://{place.kubectl.get('service', name)['spec']['clusterIP']}"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url, timeout=5).status_code < 500
        return False

    eventually(answers, 10)
    return url


def deployments(place: Place, name: str) -> list[str]:
    found = place.kubectl.get("deployments", "-l", f"kaito.sh/workspace={name}")["items"]
    return [item["metadata"]["name"] for item in found]


def gone(place: Place, pod: str) -> None:
    """Wait until a pod has ended."""
    place.kubectl("wait", "--for=delete", f"pod/{pod}", "--timeout=90s")


def pods(place: Place, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = place.kubectl.get("pods", "-l", f"kaito.sh/workspace={name}")["items"]
    return found


MESSAGES = [{"role": "user", "content": "Say red 1."}]


@pytest.fixture(scope="module")
def document(shared_place: Place) -> dict[str, Any]:
    """A Workspace with two adapters, of which one has a strength."""
    place = shared_place
    loud, plain = (adapter_image(place, name, seed) for seed, name in enumerate(("loud", "plain"), 1))
    return inference(
        place,
        "chat",
        preset={"name": "tiny-phi-3"},
        config=config_map(place, "short", **{"max-model-len": LENGTH}),
        adapters=[adapter("loud", loud, strength="0.5"), adapter("plain", plain)],
    )


@pytest.fixture(scope="module")
def served(shared_place: Place, document: dict[str, Any], prefect_server: None) -> dict[str, Any]:
    """The facts of the run that brought it up."""
    return serve(shared_place, document)


def test_a_preset_and_its_adapters_answer_by_name(shared_place: Place, served: dict[str, Any]) -> None:
    place = shared_place
    # One strength alone: there is nothing to combine.
    assert served["service"]["models"] == ["tiny-phi-3", "loud", "plain"]
    url = address(place, "chat")
    with httpx.Client(base_url=url) as http:
        answers = [ask(http, model, MESSAGES, max_tokens=16) for model in served["service"]["models"]]
        assert len(set(answers)) == 3
        chat = http.post("/chat", json={"prompt": "Say", "generate_kwargs": {"max_new_tokens": 8}}, timeout=60)
        assert isinstance(chat.json()["Result"], str), chat.text
        long = [{"role": "user", "content": "red " * LENGTH}]
        body = {"model": "plain", "messages": long}
        refused = http.post("/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and str(LENGTH) in refused.text
    platform = KubernetesPlatform(Settings(), cluster=place.cluster)
    service = platform.service("chat")
    assert service is not None and service.models == ("tiny-phi-3", "loud", "plain")
    with platform.client(service) as http:
        assert ask(http, "loud", MESSAGES, max_tokens=16) == answers[1]


def test_adapters_are_taken_by_digest_and_strengths_as_written(shared_place: Place, served: dict[str, Any]) -> None:
    [name] = deployments(shared_place, "chat")
    job = json.loads(shared_place.kubectl.get("configmap", name)["data"]["job.json"])
    loud, plain = job["adapters"]
    assert loud["strength"] == 0.5 and "strength" not in plain
    for one in (loud, plain):
        assert one["image"].startswith(f"docker://{shared_place.registry.host}/") and "@sha256:" in one["image"]
    pod = shared_place.kubectl.get("deployment", name)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 5 + job["grace_seconds"] + 5


def passed_by_the_proxy(url: str) -> bool:
    """Whether this machine has just looked for the Service's address itself, which no machine has.

    kube-proxy gives connections to that address another one, a pod's. Of thousands, one that begins while its rules are
    written anew can miss them; it reaches no pod, and says nothing about ours.
    """
    command = ["ip", "-s", "-j", "neigh", "show", "to", httpx.URL(url).host]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout or "[]")
    return any("FAILED" in one["state"] and one["updated"] <= 3 for one in found)


class Asker:
    """Asks without a pause, each time over a new connection or always over the same, and keeps what went wrong."""

    def __init__(self, url: str, *, keep_alive: bool) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._limits = httpx.Limits() if keep_alive else httpx.Limits(max_keepalive_connections=0)
        self._url = url
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, limits=self._limits) as http:
            while not self._over.is_set():
                begun = time.strftime("%X")
                try:
                    ask(http, "tiny-phi-3", MESSAGES, max_tokens=4)
                    self.answered += 1
                except KaitoFlowsError as exc:
                    if not passed_by_the_proxy(self._url):
                        self.failures.append(f"{begun} to {time.strftime('%X')}: {exc}")

    def end(self) -> None:
        self._over.set()
        self.thread.join()


@contextlib.contextmanager
def asking(url: str) -> Iterator[list[Asker]]:
    askers = [Asker(url, keep_alive=keep_alive) for keep_alive in (False, True)]
    for asker in askers:
        asker.thread.start()
    try:
        yield askers
    finally:
        for asker in askers:
            asker.end()


def test_another_revision_takes_over_without_a_failed_request_and_a_broken_one_does_not(
    shared_place: Place, document: dict[str, Any], served: dict[str, Any]
) -> None:
    place = shared_place
    [before] = deployments(place, "chat")
    [old_pod] = [pod["metadata"]["name"] for pod in pods(place, "chat")]
    third = adapter("third", adapter_image(place, "third", 3))
    broken = adapter("broken", adapter_image(place, "broken", 4, adapter_model=b"no safetensors"))
    settings, loud = document["inference"], document["inference"]["adapters"][0]
    with asking(address(place, "chat")) as askers:
        facts = serve(place, {**document, "inference": {**settings, "adapters": [loud, third]}})
        assert facts["service"]["models"] == ["tiny-phi-3", "loud", "third"]
        [after] = deployments(place, "chat")
        assert after != before
        gone(place, old_pod)
        with pytest.raises(KaitoFlowsError) as failure:
            serve(place, {**document, "inference": {**settings, "adapters": [loud, broken]}})
        assert failure.value.code == "adapter-unreadable" and "broken" in str(failure.value)
        assert deployments(place, "chat") == [after]
        services = place.kubectl.get("services", "-l", "kaito.sh/workspace=chat")["items"]
        assert [item["metadata"]["name"] for item in services] == ["chat"]
        assert [item["metadata"]["name"] for item in place.kubectl.get("configmaps")["items"]].count(before) == 0
    assert [asker.failures for asker in askers] == [[], []]
    assert all(asker.answered > 10 for asker in askers)
    with httpx.Client(base_url=address(place, "chat")) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == facts["service"]["models"]


def test_the_second_pod_finds_the_model_that_the_first_one_left_on_the_node(
    shared_place: Place, served: dict[str, Any]
) -> None:
    def standing() -> list[dict[str, Any]]:
        return [pod for pod in pods(shared_place, "chat") if not pod["metadata"].get("deletionTimestamp")]

    eventually(lambda: len(standing()) == 1, 30)
    [pod] = standing()
    told = shared_place.kubectl("logs", pod["metadata"]["name"], "-c", "weights")
    stages = [json.loads(line)["name"] for line in told.splitlines() if '"stage"' in line]
    assert stages == ["look for weights"]


def test_a_pod_template_is_served_as_it_is(shared_place: Place, busybox: str) -> None:
    place, name = shared_place, unique("web")
    script = "mkdir /tmp/www && echo hello > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"
    container = {
        "name": "web",
        "image": busybox,
        "command": ["sh", "-c", script],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
    }
    facts = serve(place, inference(place, name, template={"spec": {"containers": [container]}}))
    assert facts["service"]["models"] == []
    assert httpx.get(address(place, name)).text == "hello\n"
    found = place.kubectl.get("workspace", name)["status"]["conditions"]
    assert {c["type"]: c["status"] for c in found}["InferenceReady"] == "True"


def test_what_cannot_be_served_is_refused_by_name_and_starts_nothing(shared_place: Place) -> None:
    place, name = shared_place, unique("bad")
    nothing = place.image("nothing")
    preset = {"name": "tiny-phi-3"}
    with pytest.raises(ImageError) as failure:
        serve(place, inference(place, name, preset=preset, adapters=[adapter("absent", nothing)]))
    assert failure.value.code == "image-not-found" and "nothing" in str(failure.value)
    config = config_map(place, "foreign", **{"gpu-memory-utilization": 0.9})
    with pytest.raises(InputError, match="gpu-memory-utilization"):
        serve(place, inference(place, name, preset=preset, config=config))
    with pytest.raises(InputError) as missing:
        serve(place, inference(place, name, preset=preset, config="nowhere"))
    assert missing.value.code == "config-map-not-found"
    assert deployments(place, name) == [] and pods(place, name) == []
