"""What every program in a pod does: read its job file, say what it does on standard output, end with a known exit code.

Standard output carries one JSON object a line and nothing else; logs go to standard error, and so does whatever a
library or a child process prints. The last event, `completed` or `failed`, is also written to /dev/termination-log
where that is there, as it is in pods: Kubernetes keeps it when the log is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from kaito_flows.errors import InputError, KaitoFlowsError, disk_errors

__all__ = ["EVENTS", "emit", "read_job", "run", "shortened", "strict"]

T = TypeVar("T")

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_BYTES = 4096
"""What Kubernetes keeps of a container's last words."""

EVENTS = "KAITO_FLOWS_EVENTS"
"""The environment variable with the path to which events go instead, for a program that starts this one."""

_lock = threading.Lock()
_events: TextIO | None = None


def emit(event: str, **facts: Any) -> None:
    """Write one event to standard output, whole and at once; when nobody reads any more, the work goes on."""
    line = json.dumps({"event": event, **facts}, ensure_ascii=False) + "\n"
    with _lock, contextlib.suppress(BrokenPipeError):
        out = _events or sys.stdout
        out.write(line)
        out.flush()


def read_job(path: Path, cls: type[T]) -> T:
    """Read a job file into a frozen dataclass.

    Raises:
        InputError: it is not there, not JSON, has an unknown key, lacks one, or a value has the wrong type.
    """
    try:
        raw = json.loads(Path(path).read_bytes())
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror}", place=str(path), code="invalid-job") from exc
    except ValueError as exc:
        raise InputError(f"not JSON: {exc}", place=str(path), code="invalid-job") from exc
    return strict(cls, raw, place=str(path))


def strict(cls: type[T], raw: object, *, place: str, error: type[KaitoFlowsError] = InputError) -> T:
    """Build a dataclass from a mapping, nested ones too: every key known, every required key there, every type right.

    Raises:
        KaitoFlowsError: of the class `error`; its place is `place: path.of.the.key`.
    """
    return _mapping(cls, raw, place, "", error)


def _mapping(cls: type[T], raw: object, place: str, path: str, error: type[KaitoFlowsError]) -> T:
    here = f"{place}: {path}" if path else place
    if not isinstance(raw, Mapping):
        raise error(f"must be a mapping, not {_shown(raw)}", place=here)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise error(f'unknown key "{key}"', place=here, hint=f'did you mean "{close[0]}"?' if close else "")
    values = {}
    for name, field in fields.items():
        inner = f"{path}.{name}" if path else name
        if name in raw:
            values[name] = _value(hints[name], raw[name], place, inner, error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error("is required", place=f"{place}: {inner}")
    return cls(**values)


def _value(hint: Any, value: Any, place: str, path: str, error: type[KaitoFlowsError]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _mapping(hint, value, place, path, error)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, place, path, error)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], v, place, f"{path}[{i}]", error) for i, v in enumerate(value))
    if origin is typing.Literal:
        # 1 == True, and 0 == False: the type counts too.
        if not any(type(value) is type(choice) and value == choice for choice in args):
            choices = ", ".join(map(_shown, args))
            must = f"must be {choices}" if len(args) == 1 else f"must be one of {choices}"
            raise error(f"{must}, not {_shown(value)}", place=f"{place}: {path}")
        return value
    if hint is Any or (origin not in (None, tuple) and isinstance(value, origin)):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kind = _KINDS.get(origin or hint) or getattr(hint, "__name__", str(hint))
    raise error(f"must be {kind}, not {_shown(value)}", place=f"{place}: {path}")


_KINDS: dict[Any, str] = {
    bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path",
    tuple: "a list", list: "a list", dict: "a mapping",
}  # fmt: skip


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def run(main: Callable[[T], dict[str, Any]], cls: type[T], argv: Sequence[str]) -> NoReturn:
    """Read the job file that `argv[1]` names, run `main` on it, tell how it ended, and exit with the code of that."""
    _keep_stdout_for_events()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request, and 401s that are no fault
    try:
        if len(argv) != 2:
            raise InputError(f"one argument is needed, the path of a job file; got {len(argv) - 1}", code="invalid-job")
        job = read_job(Path(argv[1]), cls)
        with disk_errors(Path.cwd()):
            facts = main(job)
            _last_words("completed", facts)
            emit("completed", **facts)
    except KaitoFlowsError as exc:
        if exc.__cause__ is not None:
            traceback.print_exception(exc.__cause__)
        _end(exc.as_dict(), exc.job_exit_code)
    except Exception as exc:  # noqa: BLE001 - the last line and the exit code are owed for every failure
        traceback.print_exc()
        message = " ".join(f"{type(exc).__name__}: {exc}".split())
        hint = "the log has the traceback"
        _end({"code": "unexpected-error", "place": "", "message": message, "hint": hint}, 1)
    sys.exit(0)


def _end(facts: dict[str, Any], exit_code: int) -> NoReturn:
    _last_words("failed", facts)
    # On a full disk the line cannot be written, but the exit code says the same.
    with contextlib.suppress(OSError):
        emit("failed", **facts)
    sys.exit(exit_code)


def _last_words(event: str, facts: Mapping[str, Any]) -> None:
    """Write the event where Kubernetes looks for it, unless another program speaks for this one."""
    if EVENTS in os.environ or not TERMINATION_LOG.exists():
        return
    with contextlib.suppress(OSError):
        TERMINATION_LOG.write_bytes(shortened({"event": event, **facts}, TERMINATION_BYTES))


def shortened(event: Mapping[str, Any], limit: int) -> bytes:
    """Return the event as JSON of at most `limit` bytes: its longest texts are cut, and its largest facts left out."""
    left = dict(event)
    while len(line := json.dumps(left, ensure_ascii=False).encode()) > limit:
        largest = max((key for key in left if key != "event"), key=lambda key: len(json.dumps(left[key])))
        value = left[largest]
        if isinstance(value, str) and len(value) > 64:
            left[largest] = value[: len(value) // 2] + "…"
        else:
            del left[largest]
            left["left_out"] = True
    return line


def _keep_stdout_for_events() -> None:
    """Let file descriptor 1 be standard error from now on, and events go where it went."""
    global _events
    sys.stdout.flush()
    elsewhere = os.environ.get(EVENTS)
    handle = os.open(elsewhere, os.O_WRONLY) if elsewhere else os.dup(1)
    _events = os.fdopen(handle, "w", encoding="utf-8")
    os.dup2(2, 1)
