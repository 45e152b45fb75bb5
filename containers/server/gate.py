"""What every request passes first: the size limit, the counting, and one line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kaito_flows.containers.server.metrics import ServerMetrics
from kaito_flows.containers.server.refusal import Refusal

__all__ = ["Gate", "set_model"]

logger = logging.getLogger(__name__)

# Some 128 thousand tokens of text, twice over.
MAX_BODY_BYTES = 2 << 20
# A client that sends too much is listened to for so long, so that it can read why it is refused.
MAX_DRAINED_BYTES = 8 * MAX_BODY_BYTES
# Asked every few seconds by probes and by Prometheus: not worth a line each.
QUIET_ROUTES = frozenset({"/health", "/metrics"})
_MODEL = "kaito_flows.model"


def set_model(scope: Any, name: str) -> None:
    """Tell the gate which of the served models a request is for."""
    scope[_MODEL] = name


class Gate:
    """ASGI middleware: refuses bodies over `MAX_BODY_BYTES`, measures and logs each request.

    While `draining()`, each answer is the last one of its connection.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, draining: Callable[[], bool] = lambda: False) -> None:
        self.app = app
        self.metrics = metrics
        self.draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 499, time.monotonic()

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.draining():
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                body = await _read(receive)
                if body is None:
                    refusal = Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
                    openai = scope["path"].startswith("/v1/")
                    response = JSONResponse(refusal.openai_body() if openai else refusal.kaito_body(), refusal.status)
                    response.headers["connection"] = "close"
                    await response(scope, receive, send_and_see)
                else:
                    await self.app(scope, _replay(body, receive), send_and_see)
            except Exception:
                status = 500
                raise
            finally:
                self._count(scope, status, time.monotonic() - start)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        model = scope.get(_MODEL, "")
        self.metrics.requests.labels(route, model, str(status)).inc()
        self.metrics.request_seconds.labels(route, model).observe(seconds)
        if route not in QUIET_ROUTES:
            logger.info("%s %s %s %d %.3fs", scope["method"], route, model or "-", status, seconds)


async def _read(receive: Receive) -> list[Message] | None:
    """Read the whole body; None when it is too large. The messages are given on as they came."""
    messages: list[Message] = []
    size = 0
    while size <= MAX_DRAINED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if size <= MAX_BODY_BYTES:
            messages.append(message)
        else:
            messages.clear()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages if size <= MAX_BODY_BYTES else None
    return None


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replay() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return replay
