"""The one exception by which a request is refused, and its two forms on the wire."""

from __future__ import annotations

from typing import Any

__all__ = ["Refusal", "printable"]


def printable(value: Any) -> Any:
    """A value with what UTF-8 cannot hold (half of a surrogate pair, which JSON can name) replaced."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


class Refusal(Exception):
    """A request that is answered with an error: HTTP status, message, a stable code, and the parameter at fault."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = printable(" ".join(message.split()))
        self.code = code
        self.param = printable(param)

    def openai_body(self) -> dict[str, Any]:
        """The body as OpenAI's API writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def kaito_body(self) -> dict[str, Any]:
        """The body as KAITO's server (FastAPI) writes it."""
        return {"detail": self.message}
