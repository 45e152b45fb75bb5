"""Tiny random models, small datasets in images, and the real program as a process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save as save_arrays
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kaito_flows.containers.tuner.data import Dataset, load_dataset, unpack
from kaito_flows.containers.tuner.job import TrainingConfig, read_config
from kaito_flows.containers.tuner.model import Adapted, adapt, load_base
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.containers.tuner.training import train
from kaito_flows.oci.images import build_image, open_image
from kaito_flows.oci.layout import Layout

VOCABULARY = 256
PAD = 0
LENGTH = 48
IDENTITY = "ab" * 32
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    **dict.fromkeys(("llama", "qwen2", "gemma", "mistral"), SEPARATE),
}
TEMPLATE = (
    "{% for m in messages %}{{ 't3 ' + m['content'] + ' t4 ' if m['role'] == 'user' else m['content'] + ' <2> ' }}"
    "{% endfor %}"
)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer whose words are `<0>` to `<2>` and `t3` to `t255`, by their numbers; chats as `make_document`'s."""
    # Special tokens are found inside of words too.
    words = {f"<{number}>" if number < 3 else f"t{number}": number for number in range(VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="<0>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<0>", bos_token="<1>", eos_token="<2>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)


def make_model(kind: str, folder: Path | None = None, **changed: Any) -> Any:
    """A random model of that kind, saved with a tokenizer if a folder is given."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
    }  # fmt: skip
    if kind == "phi3":
        sizes["original_max_position_embeddings"] = 512
    if kind == "falcon":
        del sizes["head_dim"]  # a property there
    config = AutoConfig.for_model(kind, **{**sizes, **changed})
    model = AutoModelForCausalLM.from_config(config)
    if folder is not None:
        model.save_pretrained(folder)
        make_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the tiny models, by kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in TARGETS}
    for kind, folder in folders.items():
        make_model(kind, folder)
    return folders


def make_document(random: np.random.RandomState) -> tuple[list[int], list[int]]:
    """A question of some tokens, and an answer that depends on its first; the answer and its end are learned."""
    question = [3, *random.randint(20, VOCABULARY, random.randint(2, 8)).tolist(), 4]
    answer = [5 + (question[1] % 8)] * random.randint(2, 5)
    return [*question, *answer, 2], [0] * len(question) + [1] * (len(answer) + 1)


def make_rows(rows: int, seed: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Rows of packed documents, padded at the end, as the dataset's part makes them."""
    random = np.random.RandomState(seed)
    arrays = {
        "input_ids": np.full((rows, length), PAD, np.int32),
        "loss_mask": np.zeros((rows, length), np.uint8),
        "position_ids": np.zeros((rows, length), np.int32),
    }
    for row in range(rows):
        end = 0
        while True:
            ids, mask = make_document(random)
            if end + len(ids) > length:
                break
            place = slice(end, end + len(ids))
            arrays["input_ids"][row, place] = ids
            arrays["loss_mask"][row, place] = mask
            arrays["position_ids"][row, place] = np.arange(len(ids))
            end += len(ids)
        arrays["position_ids"][row, end:] = np.arange(length - end)
    return arrays


Rows = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def rows() -> Rows:
    """A training split of 20 rows, and a held-out one of 4."""
    return {"train": make_rows(20, seed=1), "validation": make_rows(4, seed=2)}


def make_dataset(layout: Path, rows: Rows, **replaced: bytes | None) -> str:
    """The dataset's image; `replaced` puts other bytes in a file's place, or leaves it out."""
    length = rows["train"]["input_ids"].shape[1]
    splits = {
        name: {
            "rows": len(arrays["input_ids"]),
            "documents": int((arrays["position_ids"] == 0).sum()),
            "tokens": int((arrays["input_ids"] != PAD).sum()),
            "trained_tokens": int(arrays["loss_mask"].sum()),
        }
        for name, arrays in rows.items()
    }
    facts = {
        "format_version": 1, "sequence_length": length, "pad_token_id": PAD, "splits": splits,
        "sources": [{"url": "https://example.org/chats.parquet", "sha256": "cd" * 32, "bytes": 123, "rows": 99}],
    }  # fmt: skip
    files: dict[str, bytes | None] = {f"{name}.safetensors": save_arrays(arrays) for name, arrays in rows.items()}
    files = {**files, "dataset.json": json.dumps(facts).encode(), "report.md": b"# report\n", **replaced}
    layer = {f"data/{name}": content for name, content in files.items() if content is not None}
    return build_image(Layout(layout), [layer], annotations={}, tag="dataset").reference


def make_config(method: str, kind: str, **changed: Any) -> dict[str, Any]:
    """A resolved training config; `changed` are keys of any section."""
    config: dict[str, dict[str, Any]] = {
        "ModelConfig": {
            "torch_dtype": "float32", "local_files_only": True, "device_map": "auto", "attn_implementation": "sdpa",
        },
        "QuantizationConfig": {
            "load_in_4bit": method == "qlora", "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": True,
        },
        "LoraConfig": {
            "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": TARGETS[kind], "bias": "none",
            "use_rslora": False, "use_dora": False,
        },
        "TrainingArguments": {
            "output_dir": "/mnt/results", "num_train_epochs": 2.0, "max_steps": -1, "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "warmup_steps": 1, "weight_decay": 0.01,
            "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "optim": "adamw_torch",
            "logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
            "eval_strategy": "no", "eval_steps": 3, "gradient_checkpointing": False, "seed": 7, "max_length": LENGTH,
            "packing": True, "ddp_find_unused_parameters": False, "report_to": "none",
        },
        "DatasetConfig": {
            "shuffle_dataset": True, "shuffle_seed": 42, "train_test_split": 0.9, "messages_column": None,
            "context_column": None, "response_column": None,
        },
        "DataCollator": {"mlm": False},
    }  # fmt: skip
    for key, value in changed.items():
        # Options that are off are in no section.
        [section] = [section for section in config if key in config[section]] or ["TrainingArguments"]
        config[section][key] = value
    return config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> Dataset:
    """The rows, as the tuner reads them from their image."""
    folder = tmp_path_factory.mktemp("dataset")
    unpack(open_image(make_dataset(folder / "registry", rows)), folder / "data")
    return load_dataset(folder / "data")


@pytest.fixture
def resolved(tmp_path: Path) -> Any:
    """Reads a config with these changes, as the tuner does."""

    def resolve(method: str = "qlora", kind: str = "phi3", **changed: Any) -> TrainingConfig:
        path = tmp_path / "training_config.yaml"
        path.write_text(yaml.safe_dump({"training_config": make_config(method, kind, **changed)}))
        return read_config(path, method)

    return resolve


def adapted_model(folder: Path, config: TrainingConfig) -> Adapted:
    return adapt(load_base(folder, config), "tests/tiny", config)


def trained(folder: Path, config: TrainingConfig, dataset: Dataset, results: Path) -> dict[str, torch.Tensor]:
    """Train to the end; return what the adapter's matrices are then."""
    adapted = adapted_model(folder, config)
    train(adapted, dataset, config, IDENTITY, results, Preemption())
    return {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}


@dataclass
class Root:
    """A job's root folder with everything that the tuner needs in it."""

    folder: Path
    job: Path
    output: Path

    @property
    def results(self) -> Path:
        return self.folder / "mnt/results"

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.results / "checkpoints").glob("*"))

    @property
    def tags(self) -> dict[str, str]:
        return Layout(self.output).tags()

    def write_config(self, config: dict[str, Any] | str) -> None:
        text = config if isinstance(config, str) else yaml.safe_dump({"training_config": config}, sort_keys=False)
        (self.folder / "mnt/config/training_config.yaml").write_text(text)

    def change_job(self, **changed: Any) -> None:
        self.job.write_text(json.dumps({**json.loads(self.job.read_text()), **changed}))


def make_root(
    folder: Path, weights: Path, dataset: str, config: dict[str, Any], *, method: str = "qlora", **changed: Any
) -> Root:
    """Write a job file and its surroundings under `folder`."""
    (folder / "mnt/config").mkdir(parents=True)
    (folder / "workspace").mkdir()
    (folder / "workspace/weights").symlink_to(weights)
    root = Root(folder, folder / "job.json", folder / "registry")
    root.write_config(config)
    job = {
        "version": 1, "workspace": "tiny", "identity": IDENTITY, "root": str(folder), "method": method,
        "model": {"preset": "tiny", "id": "tests/tiny", "revision": "r1"}, "dataset": dataset,
        "output": f"oci:{root.output}:run-{IDENTITY[:12]}", **changed,
    }  # fmt: skip
    root.job.write_text(json.dumps(job))
    return root


@dataclass
class Running:
    """The tuner's process, and the events that it has written."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    def lines(self, timeout: float = 240) -> Iterator[dict[str, Any]]:
        """Yield events as they come."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self.process.stdout], [], [], 0.5)[0]:
                if not (line := self.process.stdout.readline()):
                    return
                self.events.append(json.loads(line))
                yield self.events[-1]
        raise AssertionError(f"still running after {timeout} s; events: {self.events}")

    def wait_for(self, event: str, step: int) -> None:
        """Read events until that one, or a later one of its kind."""
        for told in self.lines():
            if told["event"] == event and told["step"] >= step:
                return
        raise AssertionError(f"no {event!r} at step {step} among {self.events}; exit code {self.process.wait()}")

    def end(self, number: int | None = None) -> int:
        """Send a signal, if one is given; read the rest, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        for _ in self.lines():
            pass
        return self.process.wait(timeout=30)

    def all(self, event: str) -> list[dict[str, Any]]:
        return [told for told in self.events if told["event"] == event]


def start(root: Root, *, address_space: int | None = None) -> Running:
    """Start the tuner; its standard error goes to a file beside the job."""
    limit = f"ulimit -v {address_space // 1024}; " if address_space else ""
    command = f'{limit}exec "$0" -m kaito_flows.containers.tuner "$1"'
    # Without bytecode, importing torch and transformers takes three times as long.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with (root.folder / "stderr.txt").open("a") as err:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command, sys.executable, str(root.job)],
            stdout=subprocess.PIPE, stderr=err, text=True, bufsize=1, env=environment,
        )  # fmt: skip
    return Running(process)


def run(root: Root, **options: Any) -> tuple[int, Running]:
    """Run the tuner to its end; return its exit code, and what it said."""
    running = start(root, **options)
    try:
        return running.end(), running
    finally:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGKILL)
