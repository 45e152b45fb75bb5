"""`python -m kaito_flows.containers.server JOB.json`: serve a model and its adapters until SIGTERM.

    check the port, weights, config and adapters ─► listen (/health says 503) ─► load in the background ─► "serving"

SIGTERM: what is asked is answered for `grace_seconds` more, and each answer closes its connection, so that who asks
again finds another replica. It ends earlier when nobody has asked for a second, or nobody is connected. Exit codes: 0
after SIGTERM, else those of `kaito_flows.errors`: 2 the job file, 10 `inference_config.yaml`, 12 weights, 13 memory, 17
an adapter, 18 the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from kaito_flows.containers.program import emit, run
from kaito_flows.containers.server.app import Service, make_app
from kaito_flows.containers.server.config import InferenceConfig, read_config
from kaito_flows.containers.server.inputs import check_adapter, check_weights, listen, unpack_adapter
from kaito_flows.containers.server.job import COMBINED, ServerJob
from kaito_flows.containers.server.worker import Worker

if TYPE_CHECKING:
    from kaito_flows.containers.server.engine import Engine

# Seconds for the connections to close, when the last answer is made.
CLOSING = 2


def main(job: ServerJob) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT, and return what was done."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    emit("stage", name="check inputs")
    listener = listen(job.host, job.port)
    with contextlib.closing(listener):
        check_weights(job)
        inference = read_config(job)
        for adapter in job.adapters:
            check_adapter(job, adapter)
        return asyncio.run(_serve(job, inference, listener))


async def _serve(job: ServerJob, inference: InferenceConfig, listener: socket.socket) -> dict[str, Any]:
    service = Service(job)
    config = uvicorn.Config(
        make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=CLOSING
    )
    server = _Server(config)
    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        service.draining = True
        if service.worker is not None:
            emit("stage", name="drain")
            await service.worker.stop(job.grace_seconds, lambda: bool(server.server_state.connections))
        server.should_exit = True

    def on_signal() -> None:
        if not stopping:
            stopping.append(asyncio.create_task(stop()))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    host, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loaded = _in_background(job, inference)
    either: set[asyncio.Future[Any]] = {serving, loaded}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if loaded.done() and not stopping:
        try:
            engine = loaded.result()
        except BaseException:
            server.should_exit = True
            await serving
            raise
        service.start(Worker(engine, service.metrics))
        emit("serving", host=host, port=port, models=list(engine.names))
    await serving
    emit("stage", name="stop")
    return {"models": list(job.model_names)}


class _Server(uvicorn.Server):
    """uvicorn's server, which would raise SIGTERM again at the end; signals are ours, so that the exit code is 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _load(job: ServerJob, inference: InferenceConfig) -> Engine:
    """Load the base and its adapters; blocks for seconds to minutes."""
    if any(adapter.image for adapter in job.adapters):
        emit("stage", name="unpack adapters")
    folders = [unpack_adapter(job, adapter) for adapter in job.adapters]
    emit("stage", name="load model")
    from kaito_flows.containers.server.engine import Engine  # torch: seconds, in which the port answers already

    engine = Engine.load(
        job.weights,
        name=job.model.preset,
        torch_dtype=inference.torch_dtype or job.torch_dtype,
        quantization=job.quantization,
        max_model_len=inference.max_model_len,
    )
    if folders:
        emit("stage", name="load adapters")
    for adapter, folder in zip(job.adapters, folders, strict=True):
        engine.add_adapter(adapter.name, folder, strength=1.0 if adapter.strength is None else adapter.strength)
    if job.combined:
        engine.combine(COMBINED, job.combined)
    return engine


LOADER = "model loader"


def _in_background(job: ServerJob, inference: InferenceConfig) -> asyncio.Future[Engine]:
    """Load in a daemon thread: a SIGTERM meanwhile must not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Engine] = loop.create_future()

    def settle(engine: Engine | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif engine is not None:
            future.set_result(engine)

    def load() -> None:
        engine, error = None, None
        try:
            engine = _load(job, inference)
        except BaseException as exc:  # noqa: BLE001 - it is raised again on the event loop
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, engine, error)

    threading.Thread(target=load, name=LOADER, daemon=True).start()
    return future


if __name__ == "__main__":
    try:
        run(main, ServerJob, sys.argv)
    except SystemExit as exit_:
        if any(thread.name == LOADER for thread in threading.enumerate()):
            # Python cannot end in good order while a thread is inside torch.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_.code if isinstance(exit_.code, int) else 1)
        raise
