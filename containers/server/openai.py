"""OpenAI's API: the models, chat completions and completions, whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kaito_flows.containers.server.asking import Ready, Tokens, choose_model, encode, submit, wait_for_answer
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.schemas import ChatCompletionRequest, CompletionRequest, SamplingRequest
from kaito_flows.containers.server.worker import Answer, Generation, Worker

__all__ = ["router"]

router = APIRouter(prefix="/v1")

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
Body = dict[str, Any]


@router.get("/models", summary="The base model and its adapters")
async def models(request: Request, worker: Ready) -> Body:
    """Return every model that a request may name; an adapter's `parent` is the base."""
    return {"object": "list", "data": [_model(request, worker, name) for name in worker.engine.names]}


@router.get("/models/{name}", summary="One model")
async def model(name: str, request: Request, worker: Ready) -> Body:
    """Return one model."""
    return _model(request, worker, choose_model(request, worker, name))


def _model(request: Request, worker: Worker, name: str) -> Body:
    engine, service = worker.engine, request.app.state.service
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kaito-flows",
        "root": service.origin(name),
        "parent": engine.base_name if name != engine.base_name else None,
        "max_model_len": engine.context_length,
    }


@router.post("/chat/completions", summary="Answer a conversation")
async def chat_completions(body: ChatCompletionRequest, request: Request, worker: Ready) -> Response:
    """Answer the conversation's last message, whole or (`stream`) piece by piece."""
    name = choose_model(request, worker, body.model)
    tokens = await encode(worker, [message.plain() for message in body.messages], param="messages")
    generation = _submit(body, worker, name, tokens, tokens.new_tokens(body.token_limit))

    def whole(answer: Answer) -> Body:
        return {"message": {"role": "assistant", "content": answer.text}}

    def piece(text: str) -> Body:
        return {"delta": {"content": text}}

    frame = _Frame("chatcmpl", "chat.completion", name)
    if not body.stream:
        return await _whole(request, generation, frame, whole)
    first = {"delta": {"role": "assistant", "content": ""}}
    frame.object = "chat.completion.chunk"
    return _stream(generation, frame, body, piece, first=first, last={"delta": {}})


@router.post("/completions", summary="Continue a prompt")
async def completions(body: CompletionRequest, request: Request, worker: Ready) -> Response:
    """Continue the prompt as it stands, whole or (`stream`) piece by piece."""
    name = choose_model(request, worker, body.model)
    tokens = await encode(worker, body.text, param="prompt")
    new_tokens = tokens.new_tokens(body.token_limit) if body.token_limit else min(tokens.room, COMPLETION_TOKENS)
    generation = _submit(body, worker, name, tokens, new_tokens)
    frame = _Frame("cmpl", "text_completion", name)
    if not body.stream:
        return await _whole(request, generation, frame, lambda answer: {"text": answer.text})
    return _stream(generation, frame, body, lambda text: {"text": text}, first=None, last={"text": ""})


def _submit(body: SamplingRequest, worker: Worker, name: str, tokens: Tokens, new_tokens: int) -> Generation:
    options = body.options(dict(worker.engine.sampling_defaults))
    return submit(worker, name, tokens, options, max_new_tokens=new_tokens, stop=body.stops, seed=body.seed)


class _Frame:
    """What every chunk of one answer carries."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.object = kind
        self.model = model
        self.created = int(time.time())

    def around(self, choices: list[Body], **more: Any) -> Body:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def _choice(content: Body, finish_reason: str | None) -> Body:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(answer: Answer) -> Body:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


async def _whole(
    request: Request, generation: Generation, frame: _Frame, content: Callable[[Answer], Body]
) -> Response:
    answer = await wait_for_answer(request, generation)
    return JSONResponse(frame.around([_choice(content(answer), answer.finish_reason)], usage=_usage(answer)))


def _stream(
    generation: Generation,
    frame: _Frame,
    body: SamplingRequest,
    content: Callable[[str], Body],
    *,
    first: Body | None,
    last: Body,
) -> Response:
    usage = bool(body.stream_options and body.stream_options.include_usage)
    # With include_usage, OpenAI writes `usage: null` in all chunks but the last.
    none: Body = {"usage": None} if usage else {}

    async def events() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield _event(frame.around([_choice(first, None)], **none))
            async for item in generation.items():
                if isinstance(item, Answer):
                    yield _event(frame.around([_choice(last, item.finish_reason)], **none))
                    if usage:
                        yield _event(frame.around([], usage=_usage(item)))
                else:
                    yield _event(frame.around([_choice(content(item), None)], **none))
        except Refusal as exc:
            yield _event(exc.openai_body())
        finally:
            # Also reached when the client goes away: the response is cancelled, and this with it.
            generation.cancel()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(value: Body) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
