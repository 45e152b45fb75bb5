"""The web application: probes, metrics, the form of errors, and the routers of KAITO's and OpenAI's APIs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from kaito_flows.containers.server import kaito, openai
from kaito_flows.containers.server.gate import Gate
from kaito_flows.containers.server.job import ServerJob
from kaito_flows.containers.server.metrics import METRICS_CONTENT_TYPE, ServerMetrics
from kaito_flows.containers.server.refusal import Refusal, printable
from kaito_flows.containers.server.worker import Worker

__all__ = ["Service", "make_app"]


class Service:
    """What the routes share: the job, the metrics, and the worker once the model is loaded."""

    def __init__(self, job: ServerJob) -> None:
        self.job = job
        self.metrics = ServerMetrics()
        self.worker: Worker | None = None
        self.draining = False
        self.created = int(time.time())
        self._started = time.monotonic()

    def origin(self, name: str) -> str:
        """What is served under a name: the base's id, an adapter's image or folder, or what the combined one is of."""
        adapter = next((adapter for adapter in self.job.adapters if adapter.name == name), None)
        if adapter is not None:
            return adapter.image or str(self.job.adapter_folder(name))
        return self.job.model.id if name == self.job.model.preset else "+".join(self.job.combined)

    def start(self, worker: Worker) -> None:
        """The model is loaded: answer from now on."""
        self.worker = worker
        self.metrics.load_seconds.set(time.monotonic() - self._started)
        self.metrics.up.set(1)

    @property
    def ailment(self) -> str:
        """Why it is not healthy; empty when it is."""
        if self.worker is None:
            return "Loading"
        return self.worker.failure


def make_app(service: Service) -> FastAPI:
    """Return the application; `service.worker` may come later."""
    app = FastAPI(title="kaito-flows inference", version="1", openapi_url="/openapi.json", redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, metrics=service.metrics, draining=lambda: service.draining)
    app.include_router(kaito.router)
    app.include_router(openai.router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/", summary="Whether the server runs")
    async def root() -> dict[str, str]:
        return {"message": "Server is running"}

    @app.get("/health", summary="Whether the model is loaded and answers")
    async def health() -> JSONResponse:
        ailment = service.ailment
        return JSONResponse({"status": ailment or "Healthy"}, 503 if ailment else 200)

    @app.get("/metrics", summary="Metrics in Prometheus' text form")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=METRICS_CONTENT_TYPE)

    return app


def _answer(request: Request, refusal: Refusal) -> JSONResponse:
    openai_api = request.url.path.startswith("/v1/")
    body = refusal.openai_body() if openai_api else refusal.kaito_body()
    headers = {"Retry-After": "5"} if refusal.status in (429, 503) else None
    return JSONResponse(body, refusal.status, headers)


async def _refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refusal)
    return _answer(request, exc)


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    response = _answer(request, Refusal(exc.status_code, str(exc.detail), code=code))
    response.headers.update(exc.headers or {})
    return response


async def _unexpected(request: Request, exc: Exception) -> Response:
    return _answer(request, Refusal(500, "an error in the server; its log has the traceback", code="internal_error"))


async def _invalid(request: Request, exc: Exception) -> Response:
    """A body that does not fit: 400 in OpenAI's form, else 422 with FastAPI's list; what was sent is not echoed."""
    assert isinstance(exc, RequestValidationError)
    errors = exc.errors()
    if request.url.path.startswith("/v1/"):
        worst = errors[0]
        param = _path(worst["loc"])
        code = "invalid_json" if worst["type"] == "json_invalid" else "invalid_value"
        message = f"{param}: {worst['msg']}" if param else str(worst["msg"])
        if worst["type"] == "extra_forbidden":
            code, message = "unknown_parameter", f"unknown parameter {param!r}"
        return _answer(request, Refusal(400, message, code=code, param=param or None))
    detail: list[dict[str, Any]] = [
        {"loc": [printable(p) for p in e["loc"]], "msg": e["msg"], "type": e["type"]} for e in errors
    ]
    return JSONResponse({"detail": detail}, 422)


def _path(location: Sequence[int | str]) -> str:
    """`("body", "messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
