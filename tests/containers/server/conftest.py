"""A tiny random Phi-3 with a byte-level tokenizer, two adapters in images, and the real server on a loopback port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from kaito_flows.oci.images import build_image
from kaito_flows.oci.layout import Layout

PRESET = "tiny-phi3"
MODEL_ID = "tests/tiny-phi3"
CONTEXT = 4096
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Phi-3's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 64, context: int = CONTEXT) -> Phi3ForCausalLM:
    """A random model that never ends by itself and writes ASCII for the most part, with half characters between."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
        original_max_position_embeddings=context, initializer_range=0.3,
        bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # a special token is never the best one
        for token in range(256):
            text = tokenizer.decode([token])
            if not text.isascii() and token % 4:
                model.lm_head.weight[token] = 0
    return model


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, as the weights job makes it."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(weights: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter that changes every answer: B is not zero."""
    base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def pack(adapter: Path, layout: Path, **changed: bytes) -> str:
    """The adapter's image, as the tuner makes it; `changed` replaces files, by name without its ending."""
    names = {"adapter_model": "adapter_model.safetensors", "adapter_config": "adapter_config.json"}
    files = {key: changed.get(key, (adapter / name).read_bytes()) for key, name in names.items()}
    layers = [{f"data/{names[key]}": files[key]} for key in names if files[key]]
    layers[-1]["data/README.md"] = b"# a test\n"
    return build_image(Layout(layout), layers, annotations={"sh.kaito.model.name": PRESET}).reference


@pytest.fixture(scope="session")
def adapters(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of two adapters; one has a dot in its name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(weights, folder / name, seed) for seed, name in enumerate(["glosses", "verses.v2"], 1)}


@pytest.fixture(scope="session")
def images(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The adapters' images, by digest."""
    layout = tmp_path_factory.mktemp("registry")
    return {name: pack(folder, layout) for name, folder in adapters.items()}


def write_job(folder: Path, weights: Path, images: dict[str, str], **changed: Any) -> Path:
    """A root folder with the weights in it, and the job file."""
    workspace = folder / "workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    if not (workspace / "weights").exists():
        (workspace / "weights").symlink_to(weights)
    job = {
        "version": 1,
        "workspace": "tiny",
        "root": str(folder),
        "host": "127.0.0.1",
        "port": 0,
        "model": {"preset": PRESET, "id": MODEL_ID, "revision": "r1"},
        "torch_dtype": "float32",
        "quantization": None,
        "adapters": [{"name": name, "image": image} for name, image in images.items()],
        **changed,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


class Running:
    """A server's process, and the events that it has written; a thread reads them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def wait_for(self, timeout: float = 60, **facts: Any) -> dict[str, Any]:
        """Wait for an event with these facts."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            alive = self._reader.is_alive()
            for event in list(self.events):
                if facts.items() <= event.items():
                    return event
            if not alive:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {facts} among {self.events}; exit code {self.process.poll()}")

    def end(self, timeout: float = 20) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.rest(timeout)

    def rest(self, timeout: float = 60) -> int:
        """Wait for the end by itself; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code


def start(job: Path) -> Running:
    """Start the server; its standard error goes to a file beside the job."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (job.parent / "stderr.txt").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "kaito_flows.containers.server", str(job)],
            stdout=subprocess.PIPE, stderr=err, text=True, bufsize=1, env=env,
        )  # fmt: skip
    return Running(process)


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    running: Running
    url: str
    serving: dict[str, Any]
    root: Path


@pytest.fixture(scope="session")
def launched(
    weights: Path, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    """The server of `served`, not yet waited for: other tests use the seconds in which it loads torch."""
    root = tmp_path_factory.mktemp("served")
    running = start(write_job(root, weights, images))
    yield running, root
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="session")
def served(launched: tuple[Running, Path]) -> Served:
    """The server with the base model and both adapters, for all tests that only ask."""
    running, root = launched
    serving = running.wait_for(event="serving")
    return Served(running, f"http://{serving['host']}:{serving['port']}", serving, root)


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        yield client
