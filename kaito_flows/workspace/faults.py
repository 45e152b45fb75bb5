"""From pydantic's complaints to faults that a person can act on: the path, the nearest known key, the reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kaito_flows.errors import Fault
from kaito_flows.urls import without_secrets


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like `word`, or "" when none is."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else ""


def path_of(location: Sequence[int | str]) -> str:
    """Write a location as people do: `tuning.input.urls[0]`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def faults_of(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> Iterator[Fault]:
    """Translate each error of a pydantic validation of `model`."""
    for detail in error.errors(include_url=False):
        location = [part for part in detail["loc"] if part not in ("kaito.sh/v1alpha1", "kaito.sh/v1beta1")]
        path = prefix + path_of(location)
        match detail["type"]:
            case "extra_forbidden":
                known = _keys_at(model, location[:-1])
                like = nearest(str(location[-1]), known)
                hint = f'did you mean "{like}"?' if like else f"known keys: {', '.join(sorted(known))}"
                yield Fault(path, f'unknown key "{location[-1]}"', hint, code="unknown-key")
            case "missing":
                yield Fault(path, "is required", "add it", code="missing-key")
            case "literal_error" | "enum":
                message = f"{detail['input']!r} is not {detail['ctx']['expected']}"
                yield Fault(path, message, "write one of these", code="invalid-value")
            case _:
                yield Fault(path, f"{detail['msg']}, not {_short(detail['input'])}", code="invalid-value")


def _short(value: object) -> str:
    text = without_secrets(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        fields = {(f.alias or name): f for name, f in current.model_fields.items()}
        current = _model_in(fields[part].annotation) if part in fields else None
        if current is None:
            return []
    return [f.alias or name for name, f in current.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, list) or get_args(annotation):
        return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
    return None
