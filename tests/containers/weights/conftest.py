"""What the tests of the weights program share: running it, small GGUF files and wheels, a Hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kaito_flows.presets.loader import load_preset


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, its events, and its standard error."""

    exit_code: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]


def _run_weights(
    root: Path, source: dict[str, Any], cache: Path, job_keys: dict[str, Any] | None = None, **env: str
) -> Outcome:
    job = root.parent / f"{root.name}.json"
    facts = {"version": 1, "root": str(root), "cache": str(cache), "source": source, **(job_keys or {})}
    job.write_text(json.dumps(facts))
    command = [sys.executable, "-m", "kaito_flows.containers.weights", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)
    return Outcome(done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr)


def _source_of(preset: str) -> dict[str, Any]:
    return load_preset(preset).source.model_dump(mode="json", exclude_none=True)


@pytest.fixture(scope="session")
def run_weights() -> Callable[..., Outcome]:
    return _run_weights


@pytest.fixture(scope="session")
def source_of() -> Callable[[str], dict[str, Any]]:
    return _source_of


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., dict[str, Any]]:
    return _write_gguf


@pytest.fixture(scope="session")
def write_wheel() -> Callable[..., dict[str, Any]]:
    return _write_wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the only package index there is."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the preset's package becomes, fetched as a user's machine would fetch it."""
    folder = tmp_path_factory.mktemp("smollm2")
    outcome = _run_weights(folder / "root", _source_of("smollm2-135m-instruct"), folder / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "root" / "workspace" / "weights"


@pytest.fixture(scope="session")
def tiny_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-phi-3")
    outcome = _run_weights(folder / "root", _source_of("tiny-phi-3"), folder / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "root" / "workspace" / "weights"


HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 16, 32, 4, 2, 2


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's convert_hf_to_gguf.py has it: `LlamaModel.permute`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", drop: str = "", extra: str = ""
) -> dict[str, Any]:
    """Write a Llama of two layers, and return its tensors as transformers names and orders them."""
    rng = np.random.RandomState(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(gguf_alphabet()), "he", "hel"]
    writer = gguf.GGUFWriter(path, architecture)
    for name, size in {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HIDDEN // HEADS,
    }.items():
        writer.add_uint32(f"{architecture}.{name}", size)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    key = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (key, HIDDEN),
        "attn_v": (key, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    named: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    named |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    named |= {extra: (HIDDEN,)} if extra else {}
    plain = {}
    for name, shape in named.items():
        if name == drop:
            continue
        plain[name] = rng.standard_normal(shape).astype(np.float32)
        heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k." in name else 0
        writer.add_tensor(name, permute(plain[name], heads) if heads else plain[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


def gguf_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _write_wheel(folder: Path, member: str, data: bytes) -> dict[str, Any]:
    """Write the wheel `tiny_gguf` with one file in it, and return the source that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / "tiny_gguf-1.0-py3-none-any.whl", "tiny_gguf-1.0.dist-info"
    contents = {
        member: data,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"kind": "pypi", "package": "tiny-gguf", "version": "1.0", "sha256": sha256, "file": member}


@dataclass
class Hub:
    """A Hub on this machine that knows one repository: enough of the protocol for the real client."""

    url: str
    files: dict[str, bytes]
    asked: list[str]
    gated: bool = False
    tokens: list[str | None] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub("", {}, [])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            state.asked.append(path)
            state.tokens.append(self.headers["Authorization"])
            if path == "/api/models/org/model/revision/main":
                siblings = [{"rfilename": name} for name in state.files]
                self._json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
            elif path == f"/api/models/org/model/tree/{COMMIT}":
                self._json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in state.files.items()
                    ]
                )
            elif path.startswith("/api/models/org/model/"):
                self._refuse(404, "RevisionNotFound")
            elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
                data = state.files[path.rsplit("/", 1)[1]]
                if state.gated:
                    self._refuse(403, "GatedRepo")
                else:
                    self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
            else:
                self._refuse(404, "RepoNotFound")

        do_HEAD = do_GET

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _hub_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that never ask the Hub say so in the environment; a test of one, in this process, leaves that behind."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
