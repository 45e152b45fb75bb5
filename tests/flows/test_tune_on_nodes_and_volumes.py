"""Tuning on a cluster in every way: one pod, two, two GPUs; data, weights and adapters on volumes and in images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pod_fixtures import PUSH_SECRET, Place, chats, chats_image, node_folder, push_image, training_config, workspace
from safetensors.numpy import load_file

from kaito_flows.errors import ImageError
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.platforms import LocalPlatform, Weights
from kaito_flows.presets.loader import load_preset
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import listening
from kaito_flows.workspace import WorkspaceV1beta1

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]

NAMESPACE = "serving"
TOLERANCE = 1e-4
"""Relative, of losses: sums are made in another order."""
STEPS = 16
KILLED_POD = "kaito-flows/rank=0"
"""The pod at which the others meet; the next one has another address."""

Told = list[dict[str, Any]]


def run(document: dict[str, Any], on_event: Any = None) -> tuple[dict[str, Any], Told]:
    """Run the flow without a service; return its facts and everything that it told."""
    told: Told = []

    def listener(stage: str, event: dict[str, Any]) -> None:
        told.append({"stage": stage, **event})
        if on_event is not None:
            on_event(event)

    with listening(listener):
        facts: dict[str, Any] = tune_workspace(WorkspaceV1beta1.model_validate(document), serve=False)
    return facts, told


def on_gpus(gpus: int) -> dict[str, Any]:
    return {"annotations": {"kaito-flows/gpus": str(gpus)}}


def curve(facts: dict[str, Any]) -> list[tuple[str, int, float]]:
    return [(told["event"], told["step"], told["loss"]) for told in facts["history"] if "loss" in told]


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference between two runs' losses, trained and held out."""
    ours, theirs = curve(one), curve(other)
    assert [point[:2] for point in ours] == [point[:2] for point in theirs]
    assert len(ours) >= STEPS
    return max(abs(a[2] - b[2]) / abs(b[2]) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def config(shared_place: Place) -> str:
    """Few steps of two rows each, of which two processes take one each.

    In bfloat16, sums that threads share out in another way differ by up to a thousandth.
    """
    return training_config(shared_place, dtype="float32", max_steps=STEPS)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume for adapters, of which this is the folder on the node."""
    return node_folder(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(
    shared_place: Place,
    config: str,
    adapter_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    prefect_server: None,
) -> Iterator[dict[str, Any]]:
    """One process, from a volume onto a volume; images go to the repository that the settings name."""
    data = node_folder(tmp_path_factory.mktemp("data"))
    (data / "chats.jsonl").write_bytes(chats())
    document = workspace(shared_place, "alone", "", config=config, metadata=on_gpus(0))
    document["tuning"]["input"] = {"volumeSource": {"hostPath": {"path": str(data)}}}
    document["tuning"]["output"] = {"volumeSource": {"hostPath": {"path": str(adapter_folder)}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAITO_FLOWS_REPOSITORY", shared_place.image("work").removesuffix(":latest"))
        patch.setenv("KAITO_FLOWS_REPOSITORY_SECRET", PUSH_SECRET)
        yield run(document)[0]


def test_data_comes_from_a_volume_and_the_adapter_goes_onto_one(
    shared_place: Place, alone: dict[str, Any], adapter_folder: Path
) -> None:
    tensors = load_file(adapter_folder / "adapter_model.safetensors")
    assert len(tensors) == 16
    metrics = json.loads((adapter_folder / "metrics.json").read_text())
    assert metrics["history"] == alone["history"]
    assert shared_place.kubectl.get("jobs")["items"] == []


def test_two_pods_of_which_one_is_killed_have_the_loss_curve_of_one(
    shared_place: Place, config: str, alone: dict[str, Any]
) -> None:
    place, killed, ranks = shared_place, [], []

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint-pushed" and not killed:
            killed.append(event["step"])
            running = place.kubectl.get("pods", "-l", "kaito-flows/job", "--field-selector=status.phase=Running")
            ranks.extend(sorted(pod["metadata"]["labels"]["kaito-flows/rank"] for pod in running["items"]))
            place.kubectl("delete", "pod", "-l", KILLED_POD, "--grace-period=0", "--force", "--wait=false")

    count = {"labelSelector": {"matchLabels": {"kubernetes.io/os": "linux"}}, "count": 2}
    document = workspace(place, "pair", chats_image(place), config=config, resource=count, metadata=on_gpus(1))
    facts, told = run(document, kill)
    assert ranks == ["0", "1"]
    [resumed] = [event["step"] for event in told if event["event"] == "resumed"]
    assert 0 < killed[0] <= resumed < STEPS
    assert furthest(facts, alone) < TOLERANCE
    assert place.kubectl.get("jobs")["items"] == []


def test_two_gpus_of_a_node_and_weights_from_an_image_have_the_loss_curve_of_one(
    shared_place: Place, config: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    place = shared_place
    preset = load_preset("tiny-phi-3")
    weights = Weights(preset.name, preset.source.model_dump(mode="json"), 0)
    folder = LocalPlatform(Settings(home=tmp_path)).ensure_weights(weights, lambda event: None)
    files = {f"model/{path.name}": path for path in folder.iterdir() if path.is_file() and path.name != "source.json"}
    model = push_image(place, "model", files)
    options = {"image": model, "imagePullSecrets": [PUSH_SECRET]}
    document = workspace(place, "gpus", chats_image(place), config=config, metadata=on_gpus(2))
    document["tuning"]["preset"]["presetOptions"] = options
    facts, told = run(document)
    assert any(event.get("name", "").startswith(f"pull docker://{place.registry.host}") for event in told)
    assert furthest(facts, alone) < TOLERANCE
    assert facts["identity"] != alone["identity"], "other weights may be in the image"
    document["metadata"]["name"] = "gone"
    document["tuning"]["output"]["image"] = place.image("gone")
    options["image"] = place.image("no-model")
    with pytest.raises(ImageError) as failure:
        run(document)
    assert failure.value.code == "image-not-found"
