"""`python -m kaito_flows.containers.tuner JOB.json`: train an adapter, prove it, publish it.

Exit codes: 0 published; 2 the job file; 10 the training config; 11 the data; 12 the weights; 13 out of memory; 14 the
loss diverged; 15 the disk is full; 16 the adapter was not proven; 17 an image; 143 stopped by SIGTERM (the training
goes on from its checkpoint when the job is started again).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kaito_flows.containers.program import emit, run
from kaito_flows.containers.tuner.image import METRICS, published, write_and_publish
from kaito_flows.containers.tuner.job import TrainingConfig, TunerJob, read_config
from kaito_flows.containers.tuner.memory import memory_errors
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.errors import UnprovenError, WeightsError, disk_errors
from kaito_flows.oci.images import Image, open_image, read_file

preemption = Preemption()


def main(job: TunerJob) -> dict[str, Any]:
    """Train, prove and publish, unless this job's adapter was published before; return the facts of the image."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if (done := published(job)) is not None:
        _forget_checkpoints(job)
        metrics = json.loads(read_file(done, f"data/{METRICS}"))
        return {**_facts(done, metrics), "reused": True, "timings": {}}
    config = read_config(job.config_file, job.method)
    with memory_errors(config):
        return _tune(job, config)


def _tune(job: TunerJob, config: TrainingConfig) -> dict[str, Any]:
    _prepare_libraries()
    timings: dict[str, float] = {}
    with _stage("read the dataset", timings):
        from kaito_flows.containers.tuner import data

        source = open_image(job.dataset)
        data.unpack(source, job.data)
        dataset = data.load_dataset(job.data)
    with _stage("load the model", timings):
        _check_weights(job.weights)
        from kaito_flows.containers.tuner import model, training

        base = model.load_base(job.weights, config)
        vocabulary = base.get_input_embeddings().weight.shape[0]
        for name, split in (("train", dataset.train), ("validation", dataset.validation)):
            if split is not None:
                split.check_against(vocabulary, model.context_length(base), place=f"{name}.safetensors")
        adapted = model.adapt(base, job.model.id, config)
    with _stage("train", timings):
        state = training.train(adapted, dataset, config, job.identity, job.results, preemption)
    with _stage("prove", timings):
        adapter_facts = model.prove(adapted)
        before, after = (training.evaluation_at(state, step) for step in (0, state.step))
        _prove_better(before, after)
    with _stage("publish", timings):
        metrics = {
            "evaluation": {"before": before, "after": after},
            "training": training.training_facts(state, dataset, config.TrainingArguments),
            "adapter": adapter_facts,
            "history": state.history,
        }
        files = model.adapter_files(adapted)
        image = write_and_publish(job, config, files, metrics, dataset.facts, source.digest)
    timings["steps_seconds"] = round(state.seconds, 3)
    timings["tokens_per_second"] = round(state.tokens / state.seconds, 1)
    with disk_errors(job.results):
        (job.results / "timings.json").write_text(json.dumps(timings, indent=1) + "\n")
    _forget_checkpoints(job)
    return {**_facts(image, metrics), "reused": False, "timings": timings}


def _prepare_libraries() -> None:
    # Everything is on disk: nothing may ask the Hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # cuBLAS gives the same sums every time only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On some CPUs bitsandbytes asks for a package with faster kernels; it is not needed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _stage(name: str, timings: dict[str, float]) -> Iterator[None]:
    """Tell that a stage begins, and remember how long it took; SIGTERM ends the program between stages."""
    preemption.check()
    emit("stage", name=name)
    begun = time.monotonic()
    yield
    timings[f"{name.split()[0]}_seconds"] = round(time.monotonic() - begun, 3)


def _check_weights(folder: Path) -> None:
    hint = "run the weights job first"
    if not (folder / "config.json").is_file():
        raise WeightsError("no config.json", place=str(folder), hint=hint, code="weights-missing")
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            "no *.safetensors; pickles are not read", place=str(folder), hint=hint, code="weights-missing"
        )


def _prove_better(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
    if before and after and not after["loss"] < before["loss"]:
        raise UnprovenError(
            f"held-out loss was {before['loss']:.4f} before training and is {after['loss']:.4f} after it",
            place="adapter",
            hint="more or better data, more steps, or another learning_rate",
        )


def _facts(image: Image, metrics: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in metrics.items() if key != "history"}
    return {"image": image.reference, "digest": image.digest, "metrics": told}


def _forget_checkpoints(job: TunerJob) -> None:
    shutil.rmtree(job.results / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    preemption.listen()
    run(main, TunerJob, sys.argv)
