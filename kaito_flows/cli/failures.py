"""What was not raised on purpose, as an error of ours: the command line owes one line for every failure."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from kaito_flows.errors import DiskFullError, InputError, KaitoFlowsError, RunError, ServiceError

if TYPE_CHECKING:
    from pydantic import ValidationError

TRACEBACK = "KAITO_FLOWS_TRACEBACK"

# What the owner of a path can mend.
_OF_A_PATH = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP,
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FREE_SPACE = "free some space, or set KAITO_FLOWS_HOME elsewhere"


def from_exception(exc: Exception) -> KaitoFlowsError:
    """Return the error for any exception: what the user typed, a path, Prefect's server, else unexpected."""
    if usage := _usage(exc):
        return usage
    if isinstance(exc, OSError) and exc.errno in _FULL:
        return DiskFullError("no space left on device", place=_path(exc), hint=_FREE_SPACE)
    if isinstance(exc, OSError) and exc.filename and exc.errno in _OF_A_PATH:
        hint = "check the path and who may write there; KAITO_FLOWS_HOME says where kaito-flows keeps its files"
        return InputError(os.strerror(exc.errno), place=_path(exc), hint=hint, code="path-not-usable")
    if _is_prefects(exc):
        url = os.environ.get("PREFECT_API_URL", "")
        hint = "is it up? without PREFECT_API_URL, a run brings its own" if url else "see `prefect config view`"
        return ServiceError(
            _short(exc), place=f"Prefect's server {url}".rstrip(), hint=hint, code="prefect-unavailable"
        )
    return RunError(
        f"{type(exc).__name__}: {_short(exc)}",
        place="kaito-flows",
        hint=f"this is a fault of the program: {TRACEBACK}=1 shows the traceback, for a report",
        code="unexpected-error",
    )


def from_settings(exc: ValidationError) -> InputError:
    """Return the first setting that cannot be used, by the name of its environment variable."""
    first = exc.errors()[0]
    name = "KAITO_FLOWS_" + "_".join(map(str, first["loc"])).upper()
    hint = f"it is set to {first['input']!r}"
    return InputError(first["msg"], place=name, hint=hint, code="invalid-setting")


def _usage(exc: Exception) -> InputError | None:
    # Click's complaints (no such option); typer has a copy of click of its own, so there is no class to ask for.
    if not hasattr(exc, "format_message"):
        return None
    context = getattr(exc, "ctx", None)
    command = context.command_path if context else "kaito-flows"
    return InputError(exc.format_message().rstrip("."), place=command, hint=f"{command} --help", code="usage")


def _is_prefects(exc: BaseException | None) -> bool:
    """Whether Prefect's server was not reached, or answered with an error."""
    while exc is not None:
        module = type(exc).__module__
        if module.startswith("httpx") or "Failed to reach API" in str(exc):
            return True
        if module == "prefect.exceptions" and type(exc).__name__.startswith("PrefectHTTP"):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def _path(exc: OSError) -> str:
    return os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else ""


def _short(exc: Exception) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
