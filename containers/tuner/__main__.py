"""`python -m kaito_flows.containers.tuner JOB.json`: train an adapter, prove it, publish it.

Exit codes: 0 published; 2 the job file; 10 the training config; 11 the data; 12 the weights; 13 out of memory; 14 the loss
diverged; 15 the disk is full; 16 the adapter was not proven; 17 an image; 143 stopped by SIGTERM with a checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from kaito_flows.containers.program import emit, run
from kaito_flows.containers.tuner.job import TunerJob, read_config
from kaito_flows.errors import ImageError, OutOfMemoryError, UnprovenError
from kaito_flows.oci.images import open_image


def main(job: TunerJob) -> dict[str, Any]:
    """Train, prove and publish; a run with the same identity that was published is not trained again."""
    try:
        done = open_image(job.output)
        if done.annotations.get("io.kaito-flows.identity") == job.identity and done.layout.has(done.digest):
            return {"image": done.reference, "digest": done.digest, "reused": True}
    except ImageError:
        emit("stage", name="read inputs")
    config = read_config(job.config_file, job.method)
    try:
        return _tune(job, config)
    except Exception as exc:
        if _is_out_of_memory(exc):
            arguments = config.TrainingArguments
            raise OutOfMemoryError(
                str(exc).splitlines()[0] or "the machine has too little memory",
                place=f"max_length {arguments.max_length}, batch {arguments.per_device_train_batch_size}",
                hint="lower TrainingArguments.max_length or per_device_train_batch_size, or set gradient_checkpointing",
            ) from exc
        raise


def _tune(job: TunerJob, config: Any) -> dict[str, Any]:
    from kaito_flows.containers.tuner import data, image, model, training

    timings: dict[str, float] = {}
    clock = time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        timings[name], clock = round(time.monotonic() - clock, 3), time.monotonic()

    dataset = data.unpack(job.dataset, job.data)
    emit("stage", name="load model")
    base = model.load_model(job.weights, config)
    adapted = model.adapt(base, job.model.id, config)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    train_split = data.load_split(job.data, "train", vocabulary)
    if train_split is None:
        raise data.DatasetError("no train.safetensors", place=job.dataset, code="dataset-damaged")
    held_out = data.load_split(job.data, "validation", vocabulary)
    lap("load")

    emit("stage", name="train")
    trained = training.train(adapted, train_split, held_out, config.TrainingArguments, job.identity, job.results)
    lap("train")

    emit("stage", name="prove and publish")
    facts = model.prove_adapted(adapted, config.LoraConfig.target_modules)
    if trained.before and trained.after and not trained.after["loss"] < trained.before["loss"]:
        raise UnprovenError(
            f"held-out loss {trained.before['loss']:.4f} before, {trained.after['loss']:.4f} after",
            hint="the adapter is not better than the base: more data, more steps, or another learning rate",
        )
    adapted.peft.save_pretrained(job.results, safe_serialization=True, save_embedding_layers=False)
    image.clean_config(job.results / "adapter_config.json", job.model.id)
    metrics = {
        "evaluation": {"before": trained.before, "after": trained.after},
        "training": trained.training,
        "adapter": facts,
        "history": list(trained.history),
    }
    published = image.publish(job, config, metrics, dataset)
    shutil.rmtree(job.results / "checkpoints", ignore_errors=True)
    lap("publish")
    return {"image": published.reference, "digest": published.digest, "metrics": metrics, "timings": timings}


def _is_out_of_memory(exc: Exception) -> bool:
    return isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError) and any(t in str(exc) for t in ("out of memory", "can't allocate memory"))
    )


if __name__ == "__main__":
    run(main, TunerJob, sys.argv)
