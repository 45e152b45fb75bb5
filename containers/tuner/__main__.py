"""`python -m kaito_flows.containers.tuner JOB.json`: train an adapter, prove it, publish it.

Exit codes: 0 published; 2 the job file; 10 the training config; 11 the data; 12 the weights; 13 out of memory; 14 the
loss diverged; 15 the disk is full; 16 the adapter was not proven; 17 an image; 19 a registry says no; 20 a registry
does not answer; 137 a process of the training was killed, or another machine is gone; 143 stopped by SIGTERM. After the
last three the training goes on from its checkpoint when the job is started again.

Where the job's `world` has several processes, the program starts itself once for each (see `launch`), and ends as
they do.
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
from typing import TYPE_CHECKING, Any

from kaito_flows.containers.program import emit, run
from kaito_flows.containers.tuner.image import METRICS, published, write_and_publish
from kaito_flows.containers.tuner.job import TrainingConfig, TunerJob, read_config
from kaito_flows.containers.tuner.launch import is_worker, launch, speak_through_launcher
from kaito_flows.containers.tuner.memory import memory_errors
from kaito_flows.containers.tuner.preemption import Preemption
from kaito_flows.errors import PreemptedError, UnprovenError, WeightsError, disk_errors
from kaito_flows.oci.images import Image, open_image, read_file

if TYPE_CHECKING:
    from kaito_flows.containers.tuner.data import Dataset
    from kaito_flows.containers.tuner.model import Adapted
    from kaito_flows.containers.tuner.shipping import Shipping
    from kaito_flows.containers.tuner.world import World

preemption = Preemption()


def main(job: TunerJob) -> dict[str, Any]:
    """Train, prove and publish, unless this job's adapter was published before; return the facts of the image."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if is_worker():
        return _work(job)
    if (done := published(job)) is not None:
        _forget_checkpoints(job)
        metrics = json.loads(read_file(done, f"data/{METRICS}"))
        return {**_facts(done, metrics), "reused": True, "timings": {}}
    # A wrong config is said before processes are started.
    config = read_config(job.config_file, job.method)
    if job.nodes * job.processes > 1:
        return launch(job)
    from kaito_flows.containers.tuner.world import ALONE

    return _tune(job, config, ALONE)


def _work(job: TunerJob) -> dict[str, Any]:
    """Be one of the processes of a training."""
    from kaito_flows.containers.tuner.world import join

    _prepare_libraries()
    emit("worker", rank=int(os.environ["RANK"]))
    world = join(lambda: preemption.requested)
    try:
        facts = _tune(job, read_config(job.config_file, job.method), world)
        world.leave()
    except Exception as exc:
        world.fail(exc)
        raise
    return facts


def _tune(job: TunerJob, config: TrainingConfig, world: World) -> dict[str, Any]:
    _prepare_libraries()
    from kaito_flows.containers.tuner.shipping import Shipping

    shipping = None
    if job.checkpoints and world.first:
        shipping = Shipping(job.checkpoints, job.identity, job.checkpoint_seconds)
    try:
        with memory_errors(config):
            return _train_and_publish(job, config, world, shipping)
    except PreemptedError:
        if shipping:
            shipping.finish(job.results / "checkpoints")
        raise


def _train_and_publish(
    job: TunerJob, config: TrainingConfig, world: World, shipping: Shipping | None
) -> dict[str, Any]:
    from kaito_flows.containers.tuner import recompute
    from kaito_flows.containers.tuner.gauges import peaks, process_seconds

    timings: dict[str, float] = {}

    def on_first_step() -> None:
        timings["first_step_seconds"] = round(process_seconds(), 3)
        if world.first:
            emit("first-step", seconds=timings["first_step_seconds"])

    with _stage("read the dataset", timings):
        from kaito_flows.containers.tuner import data

        source = open_image(job.dataset)
        if world.local_rank == 0:
            data.unpack(source, job.data)
        world.wait()
        dataset = data.load_dataset(job.data)
    with _stage("load the model", timings):
        adapted = _load_model(job, config, dataset, world)
    timings["peak_host_bytes_loading"] = peaks(world.device)["peak_host_bytes"]
    with _stage("train", timings):
        from kaito_flows.containers.tuner import model, outcome, training

        state = training.train(
            adapted, dataset, config, job.identity, job.results, preemption, world=world, shipping=shipping,
            on_first_step=on_first_step,
        )  # fmt: skip
    if config.TrainingArguments.gradient_checkpointing:
        timings["blocks_recomputed"] = recompute.recomputed(adapted.model)
    with _stage("prove", timings):
        adapter_facts = model.prove(adapted)
        published_step = outcome.published_step(state, config.TrainingArguments)
        before, after = (outcome.evaluation_at(state, step) for step in (0, published_step))
        _prove_better(before, after)

    _, total = training.steps_of(config.TrainingArguments, dataset)

    def publish() -> dict[str, Any]:
        with _stage("publish", timings):
            metrics = {
                "evaluation": {"before": before, "after": after},
                "training": outcome.training_facts(state, dataset, config.TrainingArguments, total),
                "adapter": adapter_facts,
                "history": state.history,
            }
            files = model.adapter_files(adapted)
            image = write_and_publish(job, config, files, metrics, dataset.facts, source.digest)
        if not adapted.sharded:
            _tell_samples(adapted, job, world)
        timings["steps_seconds"] = round(state.seconds, 3)
        timings["tokens_per_second"] = round(state.tokens / state.seconds, 1)
        timings.update(peaks(world.device))
        with disk_errors(job.results):
            (job.results / "timings.json").write_text(json.dumps(timings, indent=1) + "\n")
        if shipping:
            shipping.settle()
        _forget_checkpoints(job)
        return {**_facts(image, metrics), "reused": False, "timings": timings}

    told: dict[str, Any] = world.tell("published", publish)
    if adapted.sharded:
        _tell_samples(adapted, job, world)
    return told


def _tell_samples(adapted: Adapted, job: TunerJob, world: World) -> None:
    """Tell how base and adapter answer a few prompts; with the adapter published, a failure is told and no more.

    Processes that hold the base model together write the answers together. There a failure of one is that of all: the
    others would wait for it. The adapter is found when the job is begun again.
    """
    from kaito_flows.containers.tuner import samples

    if adapted.sharded:
        from kaito_flows.containers.tuner.sharding import drop_gathered

        if any(world.totals(preemption.requested)):
            return
        drop_gathered(adapted)
        with world.peers():
            answered = samples.compare(adapted, job.weights, job.data)
        if answered and world.first:
            emit("samples", samples=answered)
        return
    if preemption.requested:
        return

    try:
        answered = samples.compare(adapted, job.weights, job.data)
    except Exception as exc:
        logging.getLogger(__name__).warning("there are no sample answers", exc_info=True)
        emit("no-samples", reason=" ".join(f"{type(exc).__name__}: {exc}".split()))
        return
    if answered:
        emit("samples", samples=answered)


def _load_model(job: TunerJob, config: TrainingConfig, dataset: Dataset, world: World) -> Adapted:
    from kaito_flows.containers.tuner import model, recompute

    _check_weights(job.weights)
    free = recompute.free_bytes(world.device)
    sharded = job.shard and world.size > 1
    # What does not fit one GPU is divided on its way there.
    base = model.load_base(job.weights, config, "cpu" if sharded else str(world.device))
    vocabulary = base.get_input_embeddings().weight.shape[0]
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        if split is not None:
            split.check_against(vocabulary, model.context_length(base), place=f"{name}.safetensors")
    adapted = model.adapt(base, job.model.id, config)
    if not sharded:
        if job.memory and free is not None and config.TrainingArguments.gradient_checkpointing:
            recompute.keep_what_fits(adapted.model, job.memory, free)
        return adapted
    from kaito_flows.containers.tuner.sharding import shard

    return shard(adapted, world)


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
    if job.checkpoints:
        from kaito_flows.containers.tuner.shipping import forget

        forget(job.checkpoints)
    shutil.rmtree(job.results / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    if is_worker():
        speak_through_launcher()
    preemption.listen()
    try:
        run(main, TunerJob, sys.argv)
    except SystemExit as ended:
        # Everything is written and said. Taking the interpreter down beneath threads of PyTorch's that still run
        # ends now and then in an abort of a training that went well.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
