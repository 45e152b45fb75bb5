"""From a request's wishes to an answer: what the KAITO and the OpenAI routes share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from kaito_flows.containers.server.gate import set_model
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.worker import Answer, Generation, Order, Worker

if TYPE_CHECKING:
    from kaito_flows.containers.server.app import Service

__all__ = ["Ready", "Tokens", "choose_model", "encode", "wait_for_answer"]

DEFAULT_NEW_TOKENS = 512


def _ready(request: Request) -> Worker:
    service: Service = request.app.state.service
    if service.worker is None:
        raise Refusal(503, "the model is being loaded", code="loading")
    if service.worker.failure:
        raise Refusal(503, service.worker.failure, code="broken")
    return service.worker


Ready = Annotated[Worker, Depends(_ready)]
"""The worker, in a route that needs the model: 503 until it is loaded."""


def choose_model(request: Request, worker: Worker, name: str | None) -> str:
    """Return the served model of that name, or the default one.

    Raises:
        Refusal: (404) there is none.
    """
    engine = worker.engine
    chosen = engine.default_name if name is None else name
    if chosen not in engine.names:
        served = ", ".join(engine.names)
        raise Refusal(
            404, f"the model {chosen!r} does not exist; served are {served}", code="model_not_found", param="model"
        )
    set_model(request.scope, chosen)
    return chosen


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's tokens, and how many more the model's context has room for."""

    ids: tuple[int, ...]
    context: int

    @property
    def room(self) -> int:
        """Tokens that fit after the prompt."""
        return self.context - len(self.ids)

    def new_tokens(self, asked: int | None, *, param: str = "max_tokens") -> int:
        """How many tokens the answer may have: what was asked for, or the default.

        Raises:
            Refusal: (400) that is more than the context holds.
        """
        if asked is None:
            return min(self.room, DEFAULT_NEW_TOKENS)
        if asked > self.room:
            message = (
                f"this model's maximum context length is {self.context} tokens; "
                f"the prompt has {len(self.ids)} and {asked} were asked for the answer"
            )
            raise Refusal(400, message, code="context_length_exceeded", param=param)
        return asked


async def encode(
    worker: Worker, what: str | Sequence[Mapping[str, str]], *, keep: int | None = None, param: str
) -> Tokens:
    """Turn a raw prompt or messages into tokens; with `keep`, only the last so many of them.

    Raises:
        Refusal: (400) nothing is left of it, or it leaves no room for an answer.
    """
    engine = worker.engine
    if isinstance(what, str):
        ids = await asyncio.to_thread(engine.encode, what)
    else:
        ids = await asyncio.to_thread(engine.encode_chat, what)
    if keep is not None:
        ids = ids[-keep:]
    if not ids:
        raise Refusal(400, "the prompt is empty", code="empty_prompt", param=param)
    tokens = Tokens(ids, engine.context_length)
    if tokens.room < 1:
        message = f"this model's maximum context length is {tokens.context} tokens; the prompt has {len(ids)}"
        raise Refusal(400, message, code="context_length_exceeded", param=param)
    return tokens


def submit(
    worker: Worker,
    model: str,
    tokens: Tokens,
    options: Mapping[str, Any],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
    open_options: bool = False,
) -> Generation:
    """Check the options and put the order in the line.

    Raises:
        Refusal: 400, an option; 429 or 503, the line.
    """
    config = worker.engine.configure(options, max_new_tokens=max_new_tokens)
    return worker.submit(Order(model, tokens.ids, config, stop, seed, open_options))


async def wait_for_answer(request: Request, generation: Generation) -> Answer:
    """Wait for the whole answer; a client that goes away ends the work on it.

    Raises:
        Refusal: it could not be made, or (499) the client has gone.
    """
    answer = asyncio.ensure_future(generation.answer())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(499, "the client has gone", code="client_gone")
        return answer.result()
    finally:
        generation.cancel()
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
