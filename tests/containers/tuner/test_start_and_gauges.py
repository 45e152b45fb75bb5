"""What a run tells of its machine, and that a model is loaded in a stream and not whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
import torch
import yaml

from kaito_flows.containers.tuner import gauges
from kaito_flows.containers.tuner.gauges import Gauges, peaks, process_seconds
from kaito_flows.containers.tuner.launch import STARTED
from kaito_flows.tasks.progress import sentence

from .conftest import make_config, make_model

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What PyTorch and the driver say of a GPU that is not here."""
    shown: dict[str, Any] = {"utilization": 97, "asked": 0}

    def utilization(_: torch.device) -> int:
        shown["asked"] += 1
        if isinstance(shown["utilization"], Exception):
            raise shown["utilization"]
        return int(shown["utilization"])

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 34_200_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 40_000_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    gauges._tell_once.cache_clear()
    return shown


def test_memory_and_utilisation_of_a_gpu_are_shown_and_the_driver_is_asked_once_a_second(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauges(GPU)
    for _ in range(100):
        assert gauge.read() == {"gpu_memory_bytes": 34_200_000_000, "gpu_utilization": 97}
    assert gpu["asked"] == 1
    monkeypatch.setattr(gauges, "INTERVAL_SECONDS", 0.0)
    gpu["utilization"] = 12
    assert gauge.read()["gpu_utilization"] == 12
    assert peaks(GPU)["peak_gpu_bytes"] == 40_000_000_000


@pytest.mark.parametrize("error", [pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED), RuntimeError("no NVML")])
def test_where_the_driver_does_not_say_it_the_rest_is_shown_and_it_is_told_once(
    gpu: dict[str, Any], error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gauges, "INTERVAL_SECONDS", 0.0)
    gpu["utilization"] = error
    gauge = Gauges(GPU)
    for _ in range(3):
        assert gauge.read() == {"gpu_memory_bytes": 34_200_000_000}
    assert len(caplog.records) == 1


def test_a_cpu_shows_nothing_of_a_gpu() -> None:
    assert Gauges(torch.device("cpu")).read() == {}
    assert peaks(torch.device("cpu")).keys() == {"peak_host_bytes"}


def test_progress_reads_well_with_and_without_a_gpu() -> None:
    event = {"event": "progress", "step": 5, "total": 10, "loss": 1.5, "tokens_per_second": 20_000.4, "eta_seconds": 9}
    assert sentence(event) == "step 5/10: loss 1.500, 20000 tokens/s, 9 s to go"
    shown = {"gpu_memory_bytes": 34_200_000_000, "gpu_utilization": 97}
    assert sentence({**event, **shown}) == "step 5/10: loss 1.500, 20000 tokens/s, 9 s to go, GPU 34.2 GB at 97 %"


def test_the_time_is_counted_from_the_start_of_the_program_or_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_seconds() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)
    monkeypatch.setenv(STARTED, str(time.time() - 1000))
    assert process_seconds() == pytest.approx(1000, abs=1)


MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
from kaito_flows.containers.tuner.job import read_config
from kaito_flows.containers.tuner.model import load_base

def held():
    "What the process holds itself: pages of the files that it reads from are the kernel's to take back."
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) * 1024

def watch():
    while not done:
        peaks.append(held())
        time.sleep(0.001)

folder, small, *configs = map(Path, sys.argv[1:])
for config in configs:
    config = read_config(config, config.stem)
    load_base(small, config)  # what libraries take at the first use
    gc.collect()
    before, peaks, done = held(), [0], False
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_base(folder, config)
    done = True
    thread.join()
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, *([state.state2.absmax] if state.nested else [])]
    print(json.dumps({"peak": max(peaks) - before, "model": sum(t.numel() * t.element_size() for t in tensors)}))
    del model, tensors
"""


def test_a_model_is_loaded_and_quantised_shard_by_shard(tmp_path: Path, models: dict[str, Path]) -> None:
    """The host holds no more than 1.2 times the largest shard beside the model as it comes out."""
    folder = tmp_path / "sharded"
    model = make_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=10, head_dim=128)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) >= 3
    configs = []
    for method in ("qlora", "lora"):
        config = make_config(method, "llama", torch_dtype="bfloat16", bnb_4bit_compute_dtype="bfloat16")
        configs.append(tmp_path / f"{method}.yaml")
        configs[-1].write_text(yaml.safe_dump({"training_config": config}))
    done = subprocess.run(
        # Tensors of real models are given back to the system when they are freed; small ones are not, unless told to.
        [sys.executable, "-c", MEASURE, str(folder), str(models["llama"]), *map(str, configs)],
        env={"PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    quantised, whole = map(json.loads, done.stdout.splitlines())
    assert quantised["model"] < 0.4 * sum(shards) < 0.9 * sum(shards) < whole["model"]
    for measured in (quantised, whole):
        assert measured["peak"] <= 1.2 * max(shards) + measured["model"]
    # All shards at once would not fit in that.
    assert sum(shards) > 1.2 * max(shards) + quantised["model"]
