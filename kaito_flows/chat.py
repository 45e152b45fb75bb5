"""Talk to a service: OpenAI's `POST /v1/chat/completions`, which every platform's service answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

from kaito_flows.errors import ServiceError

Message = dict[str, str]

TIMEOUT_SECONDS = 300.0


def ask(
    http: httpx.Client, model: str, messages: Sequence[Message], *, max_tokens: int = 256, temperature: float = 0.0
) -> str:
    """Return the model's answer; the client's base address is the service.

    Raises:
        ServiceError: the service does not answer, or answers with an error.
    """
    body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
    url = str(http.base_url)
    with _service_errors(url):
        response = http.post("/v1/chat/completions", json=body, timeout=TIMEOUT_SECONDS)
        if response.status_code != 200:
            raise ServiceError(f"answered {response.status_code}: {_reason(response)}", place=url)
        answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


@contextmanager
def _service_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as exc:
        raise ServiceError(
            f"does not answer: {exc or type(exc).__name__}", place=url, hint="kaito-flows status"
        ) from exc
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise ServiceError("answered with something that is no chat completion", place=url) from exc


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (KeyError, TypeError, ValueError):
        return response.text[:200]
