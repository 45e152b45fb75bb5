"""KAITO's `POST /chat`, as its transformers runtime had it up to v0.8.

A `prompt` is continued as it stands: KAITO's text-generation pipeline puts no chat template around it. `messages` go
through the model's chat template, and only the answer comes back.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from kaito_flows.containers.server.asking import Ready, Tokens, choose_model, encode, submit, wait_for_answer
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.schemas import ChatRequest, GenerateKwargs

__all__ = ["router"]

router = APIRouter()


@router.post("/chat", summary="Continue a prompt, or answer messages")
async def chat(body: ChatRequest, request: Request, worker: Ready) -> dict[str, str]:
    """Answer as KAITO does: `{"Result": text}`."""
    model = choose_model(request, worker, body.model)
    kwargs = body.generate_kwargs or GenerateKwargs.model_validate({})
    keep = _room_for_prompt(kwargs, worker.engine.context_length) if body.handle_long_generation else None
    if body.prompt:
        tokens = await encode(worker, (body.prefix or "") + body.prompt, keep=keep, param="prompt")
    elif body.messages:
        tokens = await encode(worker, [message.plain() for message in body.messages], param="messages")
    elif body.messages is not None and body.prompt is None:
        raise Refusal(400, "Conversational parameter messages required", code="missing_parameter", param="messages")
    else:
        raise Refusal(400, "Text generation parameter prompt required", code="missing_parameter", param="prompt")
    options, stop = _options(kwargs)
    generation = submit(
        worker,
        model,
        tokens,
        options,
        max_new_tokens=_new_tokens(kwargs, tokens),
        stop=stop,
        open_options=True,
    )
    answer = await wait_for_answer(request, generation)
    text = answer.text
    if body.clean_up_tokenization_spaces and not stop:
        text = worker.engine.decode(answer.tokens, clean_up=True)
    return {"Result": body.prompt + text if body.prompt and body.return_full_text is not False else text}


def _options(kwargs: GenerateKwargs) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options for transformers, lengths left out, and the stop strings, which are ours to watch for."""
    options = kwargs.model_dump(exclude={"max_length", "max_new_tokens"}, exclude_none=True)
    stop = options.pop("stop_strings", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    if not all(isinstance(item, str) and item for item in stops):
        raise Refusal(
            400, "stop_strings: not a string or a list of strings", code="invalid_value", param="stop_strings"
        )
    if not options.get("num_beams", 1) > 1:
        options.pop("early_stopping", None)
    return options, tuple(item for item in stops if item)


def _new_tokens(kwargs: GenerateKwargs, tokens: Tokens) -> int:
    """How many tokens may be added: `max_new_tokens`, or what `max_length` leaves after the prompt."""
    if kwargs.max_new_tokens is not None:
        return tokens.new_tokens(kwargs.max_new_tokens, param="max_new_tokens")
    if kwargs.max_length is None:
        return tokens.new_tokens(None)
    left = min(kwargs.max_length - len(tokens.ids), tokens.room)
    if left < 1:
        message = (
            f"the prompt has {len(tokens.ids)} tokens and generate_kwargs.max_length, prompt and answer together, "
            f"is {kwargs.max_length}: raise it, or give max_new_tokens"
        )
        raise Refusal(400, message, code="context_length_exceeded", param="max_length")
    return left


def _room_for_prompt(kwargs: GenerateKwargs, context: int) -> int:
    """How many of the prompt's last tokens `handle_long_generation: hole` keeps, as transformers' pipeline reckons."""
    new = kwargs.max_new_tokens if kwargs.max_new_tokens is not None else 1
    total = context if kwargs.max_new_tokens is not None else min(context, kwargs.max_length or context)
    if new >= total:
        raise Refusal(400, f"{new} new tokens leave no room for a prompt", code="context_length_exceeded")
    return total - new
