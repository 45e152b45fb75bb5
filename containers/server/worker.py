"""The one thread that generates, the line before it, and a request's view of its own answer.

    route ── submit(order) ──► line (first come, first served) ──► engine thread
      ▲                                                               │
      └──────────── pieces of text, then the Answer ◄─────────────────┘

One answer is made at a time: adapters are switched on the model itself, and a greedy answer must not depend on what
else is being asked. The event loop never waits for the model, so `/health` answers meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kaito_flows.containers.server.metrics import ServerMetrics
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.errors import OutOfMemoryError

if TYPE_CHECKING:
    from kaito_flows.containers.server.engine import Engine

__all__ = ["LINGER_SECONDS", "Answer", "Generation", "Order", "Worker"]

logger = logging.getLogger(__name__)

MAX_WAITING = 64
LINGER_SECONDS = 1.0
"""How long a server that was told to stop waits for who is connected and may ask once more."""


@dataclass(frozen=True, slots=True)
class Order:
    """One generation to make: which model, the prompt's tokens, how, and where to stop.

    `config` is the engine's own (`Engine.configure`); `seed` None takes a random one; `open_options` says that the
    requester set options of transformers' `generate`, so that its complaints are about them.
    """

    model: str
    prompt: tuple[int, ...]
    config: Any
    stop: tuple[str, ...] = ()
    seed: int | None = None
    open_options: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer.

    `completion_tokens` counts the end token too; `finish_reason` is `stop`, `length` or `cancelled`.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class Generation:
    """One answer in the making, as the request sees it; belongs to the event loop that made it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.asked_at = time.monotonic()

    def cancel(self) -> None:
        """Stop at the next token; harmless when it is over."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def put(self, item: str | Answer | Exception) -> None:
        """Hand over text, the answer or the failure; called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def items(self) -> AsyncIterator[str | Answer]:
        """The pieces of text, then the `Answer`.

        Raises:
            Refusal: it could not be made.
        """
        while True:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Answer):
                return

    async def answer(self) -> Answer:
        """The answer as a whole."""
        async for item in self.items():
            if isinstance(item, Answer):
                return item
        raise AssertionError("a generation ends with an answer or raises")


class Worker:
    """The line and the thread. Everything but the generating itself happens on the event loop."""

    def __init__(self, engine: Engine, metrics: ServerMetrics, *, max_waiting: int = MAX_WAITING) -> None:
        self.engine = engine
        self.failure = ""
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._pending: set[Generation] = set()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    def submit(self, order: Order) -> Generation:
        """Put an order at the end of the line.

        Raises:
            Refusal: 429, the line is full; 503, the server is going down.
        """
        if self._stopping:
            raise _stopping()
        if len(self._pending) > self._max_waiting:
            raise Refusal(429, f"{self._max_waiting} requests are waiting already; try again later", code="server_busy")
        generation = Generation(order)
        self._pending.add(generation)
        self._count_waiting()
        self._thread.submit(self._make, generation)
        return generation

    async def stop(self, grace: float, connected: Callable[[], bool] = lambda: False) -> None:
        """Go on until the line is empty, for `grace` seconds at most; then take no more orders, and cut what is left.

        Who was let in is answered: until a service's addresses know that this server goes, it is still asked. And who
        is `connected` may be about to ask again: the line must stay empty for `LINGER_SECONDS`.
        """
        now = quiet_since = time.monotonic()
        deadline = now + grace
        while now < deadline and (self._pending or (connected() and now - quiet_since < LINGER_SECONDS)):
            await asyncio.sleep(0.05)
            now = time.monotonic()
            quiet_since = now if self._pending else quiet_since
        self._stopping = True
        for generation in self._pending:
            generation.cancel()
        self._thread.shutdown(wait=False)

    def _count_waiting(self) -> None:
        self._metrics.waiting.set(max(0, len(self._pending) - 1))

    def _make(self, generation: Generation) -> None:
        """In the engine's thread: make one answer; whatever happens, the request gets an item that ends its waiting."""
        try:
            generation.put(self._generate(generation))
        except Refusal as exc:
            generation.put(exc)
        except Exception as exc:  # noqa: BLE001 - it is logged and answered; the thread must live on
            generation.put(self._failed(exc))
        finally:
            self._loop.call_soon_threadsafe(self._forget, generation)

    def _generate(self, generation: Generation) -> Answer:
        order, metrics = generation.order, self._metrics
        first = _Once(
            lambda: metrics.first_text_seconds.labels(order.model).observe(time.monotonic() - generation.asked_at)
        )

        def on_text(text: str) -> None:
            first()
            generation.put(text)

        if generation.cancelled:
            raise self._cut()
        answer = self.engine.generate(order, on_text=on_text, cancelled=lambda: generation.cancelled)
        metrics.prompt_tokens.labels(order.model).inc(answer.prompt_tokens)
        metrics.generated_tokens.labels(order.model).inc(answer.completion_tokens)
        if answer.finish_reason == "cancelled":
            raise self._cut()
        return answer

    def _cut(self) -> Refusal:
        return _stopping() if self._stopping else Refusal(499, "the client has gone", code="client_gone")

    def _failed(self, exc: Exception) -> Refusal:
        if isinstance(exc, OutOfMemoryError):
            return Refusal(503, f"too little memory for this request: {exc.message}", code="out_of_memory")
        logger.error("generation failed", exc_info=exc)
        if "CUDA error" in str(exc):
            # After such an error every later call on the device fails: only a new process helps.
            self.failure = f"the GPU failed: {str(exc).splitlines()[0]}"
            self._loop.call_soon_threadsafe(self._metrics.up.set, 0)
        return Refusal(500, f"generation failed: {type(exc).__name__}", code="generation_failed")

    def _forget(self, generation: Generation) -> None:
        self._pending.discard(generation)
        self._count_waiting()


class _Once:
    """A call that happens the first time only."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        if self._call is not None:
            call, self._call = self._call, None
            call()


def _stopping() -> Refusal:
    return Refusal(503, "the server is going down", code="shutting_down")
