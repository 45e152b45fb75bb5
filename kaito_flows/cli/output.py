"""How facts, tables and errors look on a terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from kaito_flows.errors import KaitoFlowsError, WorkspaceError
from kaito_flows.workspace.status import WORKSPACE_SUCCEEDED, WorkspaceStatus, cost_words

_ENDLESS = 1_000_000
_JOINED = "\N{NO-BREAK SPACE}"


def line(text: str = "") -> None:
    """Print one line."""
    typer.echo(text)


def warning(text: str) -> None:
    """Print one line to standard error."""
    typer.echo(f"warning: {text}", err=True)


def error(exc: KaitoFlowsError, *, as_json: bool) -> None:
    """Print an error: a line each for the faults of a Workspace, one line for any other; with `--json` as an object."""
    if as_json:
        json_facts({"error": exc.as_dict()})
    elif isinstance(exc, WorkspaceError):
        source = f"{exc.source}: " if exc.source else ""
        for fault in exc.faults:
            path = f"{fault.path}: " if fault.path else ""
            hint = f" ({fault.hint})" if fault.hint else ""
            typer.echo(f"error: {fault.code}: {source}{path}{fault.message}{hint}", err=True)
    else:
        typer.echo(f"error: {exc}", err=True)


def json_facts(facts: Any) -> None:
    """Print facts as JSON."""
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows as columns, as kubectl does; on a terminal that is too narrow for them, a line for each column."""
    if not rows:
        return
    keys = list(rows[0])
    widths = [max(len(key), *(len(row[key]) for row in rows)) for key in keys]
    if sum(widths) + 3 * (len(widths) - 1) > _width():
        for row in rows:
            pairs([{"item": key, "value": row[key]} for key in keys[1:]], title=row[keys[0]])
        return
    for cells in ([key.upper() for key in keys], *([row[key] for key in keys] for row in rows)):
        line("   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def follow(statuses: Iterable[WorkspaceStatus]) -> None:
    """Print a line for each status that says something new: when, who, in which state, and what it does or was."""
    before: dict[str, str] = {}
    for status in statuses:
        succeeded = status.conditions.get(WORKSPACE_SUCCEEDED)
        said = (succeeded.message or succeeded.reason) if succeeded else ""
        if status.state == "Succeeded":
            said = str((status.facts.get("service") or {}).get("url", ""))
        elif status.state == "Running" and "step" in status.facts:
            said += f", step {status.facts['step']} of {status.facts['steps']}, loss {status.facts['loss']}"
        if before.get(status.name) != (text := f"{status.name}  {status.state}  {said}".rstrip()):
            before[status.name] = text
            line(f"{datetime.now():%H:%M:%S}  {text}")


def pairs(rows: Sequence[Mapping[str, str]], *, title: str = "") -> None:
    """Print rows of an item and its value, the values in one column."""
    if title:
        line(title)
    indent = 2 + max(len(row["item"]) for row in rows) + 2
    for row in rows:
        for text in pair(row["item"], row["value"], indent):
            line(text)


def pair(item: str, value: str, indent: int) -> list[str]:
    """The lines of an item and its value, wrapped to the terminal; a digest that is only to be recognised is cut."""
    value = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", "\\1", value)
    return hanging(f"  {item}", value, indent)


def hanging(label: str, text: str, indent: int, *, prose: bool = False) -> list[str]:
    """The lines of a label and the text beside it, wrapped at spaces; in prose a word that is too long is broken."""
    room = max(_width() - indent, 20)
    texts = textwrap.wrap(text, room, break_long_words=prose, break_on_hyphens=False) or [""]
    first, *rest = (each.replace(_JOINED, " ") for each in texts)
    return [(label.ljust(indent) + first).rstrip(), *(" " * indent + more for more in rest)]


def summary(facts: Mapping[str, Any]) -> None:
    """Print what a run came to: the adapter, the proof, the answers, and how to go on."""
    adapter, name = facts["adapter"], facts["workspace"]
    program = _program("kaito-flows")
    place = f" -n {facts['namespace']}" if facts.get("namespace") else ""
    evaluation = facts["metrics"]["evaluation"]
    before, after = evaluation.get("before"), evaluation.get("after")
    line()
    if facts["reused"]:
        line("nothing to train: an adapter with the same inputs was there already")
    _fact("adapter", adapter["reference"])
    _fact("digest", adapter["digest"])
    if before and after:
        _fact("held out", f"loss {before['loss']:.3f} before, {after['loss']:.3f} after")
    if (cost := facts.get("cost")) and cost["usd"] != 0:
        _fact("cost", cost_words(cost))
    if answers := facts.get("answers"):
        asked = next(m["content"] for m in reversed(answers["messages"]) if m["role"] == "user")
        system = next((m["content"] for m in answers["messages"] if m["role"] == "system"), None)
        _fact("prompt", _one_line(asked), prose=True)
        for label, key in (("base", "base"), ("tuned", "tuned"), ("data", "expected")):
            _fact(f"  {label}", _one_line(answers[key]) or "(nothing)", prose=True)
        line()
        # Commands stay on one line each, however long: they are to be copied.
        option = f" --system {shlex.quote(system)}" if system else ""
        line(f"chat     {program} chat {name}{place}{option} {shlex.quote(asked)}")
        line(f"or       curl {facts['service']['url']}/chat -H 'Content-Type: application/json' \\")
        line(f"           -d {shlex.quote(json.dumps({'messages': answers['messages']}))}")
        line(f"stop     {program} delete {name}{place}")
    for text in _where_to_look(facts["flow_run_id"]):
        line(text)
    times = (f"{stage} {seconds:.1f} s".replace(" ", _JOINED) for stage, seconds in facts["seconds"].items())
    _fact("time", ", ".join(times))


def _fact(label: str, text: str, *, prose: bool = False) -> None:
    for each in hanging(label, text, 9, prose=prose):
        line(each)


def _where_to_look(flow_run_id: str) -> list[str]:
    from prefect.utilities.urls import url_for

    # Prefect knows the address of its UI where a server is set, in the environment or in a profile.
    if url := url_for("flow-run", flow_run_id):
        return ["look at  the run in Prefect's UI:", f"  {url}"]
    start = f"look at  the run in Prefect's UI: {_program('prefect')} server start, then"
    return [start, f"  http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"]


def _width() -> int:
    """The terminal's columns; endless in a pipe, where programs and `grep` read."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _ENDLESS


def _program(name: str) -> str:
    """The program as it must be typed here: by its name where the shell finds it, else by its path."""
    own = Path(sys.argv[0]).with_name(name)
    if any(Path(folder) == own.parent for folder in os.environ.get("PATH", "").split(os.pathsep)) or not own.exists():
        return name
    return str(own)


def _one_line(text: str) -> str:
    return " ".join(text.split())
