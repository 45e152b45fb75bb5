"""`python -m benchmarks.tuner.prepare TRIAL.json`: all that our tuner's job needs, made by the product as for a pod.

The training config is the product's default for qlora, but for what the protocol fixes for everybody.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml

from benchmarks.tuner.material import LINEAR
from benchmarks.tuner.trial import SEED, Trial
from kaito_flows.containers.program import run
from kaito_flows.dataset.download import fetch
from kaito_flows.dataset.prepare import DatasetParameters, prepare_dataset
from kaito_flows.oci.images import open_repository
from kaito_flows.workspace.training_config import TrainingConfig

IDENTITY = "be" * 32


def main(trial: Trial) -> dict[str, Any]:
    """Make the dataset's image, and write the job file and the config beside it."""
    config = TrainingConfig.resolve("qlora", yaml.safe_dump({"training_config": fixed(trial)}))
    repository = f"oci:{trial.folder / 'registry'}"
    sources = fetch([trial.chats.as_uri()], trial.folder / "cache", allow_files=True)
    parameters = DatasetParameters.from_config(config.model_dump())
    prepared = prepare_dataset(sources, trial.weights, parameters, open_repository(repository))

    root = trial.folder / "root"
    (root / "mnt/config").mkdir(parents=True)
    (root / "workspace").mkdir()
    (root / "workspace/weights").symlink_to(trial.weights)
    (root / "mnt/config/training_config.yaml").write_text(config.as_yaml())
    job = {
        "version": 1, "workspace": "contest", "identity": IDENTITY, "root": str(root), "method": "qlora",
        "model": {"preset": "contest", "id": "benchmarks/random-phi-3", "revision": "seed-0"},
        "dataset": prepared.image.reference, "output": f"{repository}:run-{IDENTITY[:12]}",
    }  # fmt: skip
    (trial.folder / "job.json").write_text(json.dumps(job))
    return {"rows": prepared.facts["splits"]["train"]["rows"]}


def fixed(trial: Trial) -> dict[str, Any]:
    """What is not left to the product's defaults."""
    return {
        "ModelConfig": {"torch_dtype": trial.dtype},
        "QuantizationConfig": {"bnb_4bit_compute_dtype": trial.dtype},
        "LoraConfig": {"r": trial.r, "lora_alpha": float(trial.r), "target_modules": LINEAR},
        "TrainingArguments": {
            "max_steps": trial.steps,
            "per_device_train_batch_size": trial.rows,
            "gradient_accumulation_steps": trial.micro_steps,
            "learning_rate": trial.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "max_length": trial.length,
            "gradient_checkpointing": trial.recompute,
            "seed": SEED,
        },
        # Nobody else measures anything on held-out data.
        "DatasetConfig": {"train_test_split": 1.0, "shuffle_dataset": trial.shuffle},
    }


if __name__ == "__main__":
    run(main, Trial, sys.argv)
