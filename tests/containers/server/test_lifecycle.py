"""Starting and ending: what goes wrong before the server serves, and SIGTERM."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_flows.containers.program import read_job
from kaito_flows.containers.server.inputs import check_adapter, check_weights, listen, unpack_adapter
from kaito_flows.containers.server.job import COMBINED, Adapter, ServerJob
from kaito_flows.errors import ImageError, InputError, PortTakenError, WeightsError
from kaito_flows.oci.images import build_image
from kaito_flows.oci.layout import Layout

from .conftest import PRESET, Running, pack, start, write_job


def job_of(path: Path) -> ServerJob:
    return read_job(path, ServerJob)


@pytest.fixture
def job(weights: Path, images: dict[str, str], tmp_path: Path) -> ServerJob:
    return job_of(write_job(tmp_path, weights, images))


@pytest.fixture(scope="module", autouse=True)
def endless(
    weights: Path, tmp_path_factory: pytest.TempPathFactory, launched: tuple[Running, Path]
) -> Iterator[Running]:
    """A server to be ended by SIGTERM; it loads torch while the other tests run."""
    running = start(write_job(tmp_path_factory.mktemp("endless"), weights, {}, grace_seconds=0.5))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module", autouse=True)
def mounted(
    weights: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, endless: Running
) -> Iterator[Running]:
    """A server as in a pod, with adapters on volumes and an `inference_config.yaml`; it loads torch meanwhile too."""
    root = tmp_path_factory.mktemp("mounted")
    for name, folder in adapters.items():
        shutil.copytree(folder, root / "mnt" / "adapter" / name)
    (root / "mnt" / "config").mkdir()
    (root / "mnt" / "config" / "inference_config.yaml").write_text("vllm: {max-model-len: 2048}\n")
    strengths = [{"name": name, "strength": strength} for name, strength in zip(adapters, (0.5, 1), strict=True)]
    running = start(write_job(root, weights, {}, adapters=strengths, grace_seconds=60))
    yield running
    running.process.kill()
    running.process.wait()


def test_a_taken_port_ends_it_before_the_model_is_loaded(weights: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running = start(write_job(tmp_path, weights, {}, port=port))
        assert running.rest() == 18
    failed = running.events[-1]
    assert (failed["event"], failed["code"], failed["place"]) == ("failed", "port-taken", f"127.0.0.1:{port}")
    assert [event.get("name") for event in running.events[:-1]] == ["check inputs"]


def test_a_missing_adapter_image_ends_it_with_its_own_code(weights: Path, tmp_path: Path) -> None:
    image = f"oci:{tmp_path}/registry@sha256:{'0' * 64}"
    running = start(write_job(tmp_path, weights, {"gone": image}))
    assert running.rest() == 17
    assert running.events[-1]["code"] == "image-not-found"


def test_a_pickled_adapter_ends_it_while_it_listens_already(
    weights: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    config = (adapters["glosses"] / "adapter_config.json").read_bytes()
    layers = [{"data/adapter_config.json": config, "data/adapter_model.bin": b"\x80\x04."}]
    image = build_image(Layout(tmp_path / "registry"), layers, annotations={})
    running = start(write_job(tmp_path, weights, {"pickled": image.reference}))
    assert running.rest() == 17
    failed = running.events[-1]
    assert (failed["event"], failed["code"]) == ("failed", "file-not-in-image")
    assert "adapter_model.safetensors" in failed["message"]
    assert [event.get("name") for event in running.events[:-1]] == ["check inputs", "unpack adapters"]
    assert list((tmp_path / "mnt" / "adapter").iterdir()) == []


def test_missing_weights_end_it_with_their_own_code(tmp_path: Path) -> None:
    running = start(write_job(tmp_path, tmp_path / "nothing", {}))
    assert running.rest() == 12
    assert running.events[-1]["code"] == "weights-missing"


def test_it_answers_probes_honestly_while_the_model_is_loaded_and_sigterm_ends_it_there(
    weights: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = start(write_job(tmp_path, weights, {}, port=port))
    running.wait_for(event="stage", name="load model")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "Loading"})
        assert client.get("/").status_code == 200
        assert "kaito_flows_server_up 0.0" in client.get("/metrics").text
        chat = client.post("/chat", json={"prompt": "a"})
        assert (chat.status_code, chat.json()) == (503, {"detail": "the model is being loaded"})
    assert running.end() == 0
    assert running.events[-1]["event"] == "completed"


# --- the pieces, in this process


def test_a_port_that_is_free_again_can_be_had(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTakenError, match=str(port)):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        listen("192.0.2.1", 0)
    assert caught.value.code == "cannot-listen"


def test_an_adapter_is_unpacked_once_and_again_when_its_image_changes(
    job: ServerJob, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = job.adapters[0]
    folder = unpack_adapter(job, adapter)
    assert folder == tmp_path / "mnt" / "adapter" / "glosses"
    assert {path.name for path in folder.iterdir()} == {
        ".digest", "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    first = (folder / "adapter_model.safetensors").stat()
    unpack_adapter(job, adapter)
    assert (folder / "adapter_model.safetensors").stat().st_ino == first.st_ino
    changed = Adapter("glosses", pack(adapters["verses.v2"], tmp_path / "registry"))
    unpack_adapter(job, changed)
    expected = (adapters["verses.v2"] / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == expected
    assert [path.name for path in folder.parent.iterdir()] == ["glosses"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (b"", "file-not-in-image"),
        (b"{", "adapter-unreadable"),
        (b"[]", "adapter-unreadable"),
        (b"{}", "adapter-unreadable"),
        (b'{"peft_type": "PREFIX_TUNING"}', "adapter-kind"),
    ],
)
def test_an_image_without_a_lora_configuration_is_refused(
    job: ServerJob, adapters: dict[str, Path], tmp_path: Path, config: bytes, code: str
) -> None:
    image = pack(adapters["glosses"], tmp_path / "registry", adapter_config=config)
    with pytest.raises(ImageError) as caught:
        check_adapter(job, Adapter("odd", image))
    assert caught.value.code == code


def test_an_image_with_a_missing_layer_is_refused(job: ServerJob, adapters: dict[str, Path], tmp_path: Path) -> None:
    image = pack(adapters["glosses"], tmp_path / "registry")
    layout = Layout(tmp_path / "registry")
    layers = layout.manifest(image.rpartition("@")[2])["layers"]
    layout.blob_path(layers[0]["digest"]).unlink()
    with pytest.raises(ImageError) as caught:
        check_adapter(job, Adapter("holed", image))
    assert caught.value.code == "image-damaged"


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(
    weights: Path, adapters: dict[str, Path], tmp_path: Path, gone: str
) -> None:
    job = job_of(write_job(tmp_path, weights, {}, adapters=[{"name": "mounted", "image": None}]))
    with pytest.raises(ImageError, match="no adapter_config") as caught:
        check_adapter(job, job.adapters[0])
    folder = tmp_path / "mnt" / "adapter" / "mounted"
    assert (caught.value.code, caught.value.place) == ("adapter-missing", str(folder))
    shutil.copytree(adapters["glosses"], folder)
    check_adapter(job, job.adapters[0])
    assert unpack_adapter(job, job.adapters[0]) == folder
    (folder / gone).unlink()
    with pytest.raises(ImageError, match=f"no {gone}"):
        check_adapter(job, job.adapters[0])


@pytest.mark.parametrize("key", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_what_is_no_sum_has_no_strength(
    weights: Path, adapters: dict[str, Path], tmp_path: Path, key: dict[str, Any]
) -> None:
    config = json.loads((adapters["glosses"] / "adapter_config.json").read_bytes())
    image = pack(adapters["glosses"], tmp_path / "registry", adapter_config=json.dumps({**config, **key}).encode())

    def check(*strengths: float | None) -> None:
        named = [{"name": f"a{i}", "image": image, "strength": strength} for i, strength in enumerate(strengths)]
        job = job_of(write_job(tmp_path, weights, {}, adapters=named))
        for adapter in job.adapters:
            check_adapter(job, adapter)

    check(1.0)
    check(None, 1.0)
    for strengths in ([0.5], [1.0, 1.0]):
        with pytest.raises(ImageError, match=next(iter(key))) as caught:
            check(*strengths)
        assert caught.value.code == "adapter-strength"


@pytest.mark.parametrize("gone", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_weights_must_be_whole(weights: Path, tmp_path: Path, gone: str) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    (tmp_path / "weights" / gone).unlink()
    job = job_of(write_job(tmp_path / "root", tmp_path / "weights", {}))
    with pytest.raises(WeightsError, match="safetensors" if "model" in gone else gone):
        check_weights(job)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"version": 2}, "version"),
        ({"root": "relative"}, "root"),
        ({"port": 70000}, "port"),
        ({"port": True}, "port"),
        ({"host": ""}, "host"),
        ({"prot": 5000}, "job.json"),
        ({"torch_dtype": "int4"}, "torch_dtype"),
        ({"quantization": "nf4"}, "quantization"),
        ({"model": {"preset": "a"}}, "model.id"),
        ({"model": {"preset": "a", "id": "b", "size": "c"}}, "model"),
        ({"model": {"preset": "a", "id": 5}}, "model.id"),
        ({"adapters": {}}, "adapters"),
        ({"adapters": ["a"]}, "adapters[0]"),
        ({"adapters": [{"name": "a", "image": "b"}, {"name": "a", "image": "c"}]}, "adapters[1].name"),
        ({"adapters": [{"name": PRESET, "image": "b"}]}, "adapters[0].name"),
        ({"adapters": [{"name": "../../etc", "image": "b"}]}, "adapters[0].name"),
        ({"adapters": [{"name": "a", "strength": 1.5}]}, "adapters[0].strength"),
        ({"adapters": [{"name": "a", "strength": "0.5"}]}, "adapters[0].strength"),
        ({"adapters": [{"name": "a", "strength": float("nan")}]}, "adapters[0].strength"),
        ({"adapters": [{"name": "a", "strength": 1}, {"name": COMBINED, "strength": 1}]}, "adapters"),
        ({"grace_seconds": -1}, "grace_seconds"),
    ],
)
def test_a_job_that_cannot_be_done_names_the_key(
    weights: Path, tmp_path: Path, changed: dict[str, Any], place: str
) -> None:
    with pytest.raises(InputError) as caught:
        job_of(write_job(tmp_path, weights, {}, **changed))
    assert caught.value.place.endswith(place)


# --- the slow ones, which have loaded meanwhile


def test_adapters_on_volumes_are_served_with_their_strengths_and_the_configured_length(mounted: Running) -> None:
    serving = mounted.wait_for(240, event="serving")
    assert serving["models"] == [PRESET, "glosses", "verses.v2", COMBINED]
    with httpx.Client(base_url=f"http://127.0.0.1:{serving['port']}", timeout=60, trust_env=False) as client:
        models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert models["glosses"]["root"].endswith("/mnt/adapter/glosses")
        assert models[COMBINED]["root"] == "glosses+verses.v2"
        assert {model["max_model_len"] for model in models.values()} == {2048}
        greedy = {"prompt": "a", "generate_kwargs": {"do_sample": False, "max_new_tokens": 16}}
        told = {name: client.post("/chat", json={**greedy, "model": name}).json()["Result"] for name in models}
        assert len(set(told.values())) == 4
        # As in KAITO, who names no model asks all of them at once.
        assert client.post("/chat", json=greedy).json()["Result"] == told[COMBINED]
        long = client.post("/chat", json={"prompt": "a" * 2100, "generate_kwargs": {"max_new_tokens": 1}})
        assert long.status_code == 400
        assert long.json()["detail"].startswith(
            "this model's maximum context length is 2048 tokens; the prompt has 2100"
        )


def test_sigterm_lets_everybody_who_asked_be_answered(mounted: Running) -> None:
    url = f"http://127.0.0.1:{mounted.wait_for(240, event='serving')['port']}"
    body = {"prompt": "a", "temperature": 0, "max_tokens": 1000}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False))

    waiting = [threading.Thread(target=ask) for _ in range(3)]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as kept_open:
        assert "connection" not in kept_open.get("/health").headers
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        mounted.process.send_signal(signal.SIGTERM)
        mounted.wait_for(event="stage", name="drain")
        late = kept_open.post("/v1/completions", json={**body, "max_tokens": 2})
        assert (late.status_code, late.headers["connection"]) == (200, "close")
    for thread in waiting:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {1000}
    assert mounted.rest(30) == 0
    assert mounted.events[-1]["event"] == "completed"


def test_sigterm_cuts_an_endless_answer_when_the_grace_is_over_and_refuses_those_that_wait(endless: Running) -> None:
    running = endless
    serving = running.wait_for(240, event="serving")
    assert serving["models"] == [PRESET]
    url = f"http://127.0.0.1:{serving['port']}/v1/completions"
    body = {"prompt": "a", "temperature": 0, "max_tokens": 4000}
    waiting: list[httpx.Response] = []
    second = threading.Thread(target=lambda: waiting.append(httpx.post(url, json=body, timeout=30, trust_env=False)))
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        second.start()
        time.sleep(0.2)
        asked = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert running.rest() == 0
    assert time.monotonic() - asked < 30
    second.join()
    assert waiting[0].status_code == 503
    assert waiting[0].json()["error"]["code"] == "shutting_down"
    assert running.events[-1]["event"] == "completed"
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
