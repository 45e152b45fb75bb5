"""How facts, tables and errors look on a terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from kaito_flows.errors import KaitoFlowsError, WorkspaceError


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


def table(rows: Sequence[Mapping[str, str]], *, title: str = "") -> None:
    """Print rows as columns, as kubectl does; the last column may be long."""
    if title:
        line(title)
    if not rows:
        return
    keys = list(rows[0])
    widths = [max(len(key), *(len(str(row[key])) for row in rows)) for key in keys]
    for cells in ([key.upper() for key in keys], *([str(row[key]) for key in keys] for row in rows)):
        line("   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def pairs(rows: Sequence[Mapping[str, str]], *, title: str) -> None:
    """Print rows of an item and its value, wrapped to the terminal."""
    line(title)
    indent = 2 + max(len(row["item"]) for row in rows) + 2
    for row in rows:
        text = textwrap.wrap(row["value"], max(shutil.get_terminal_size().columns - indent, 20)) or [""]
        line(f"  {row['item']}".ljust(indent) + text[0])
        for more in text[1:]:
            line(" " * indent + more)


def summary(facts: Mapping[str, Any]) -> None:
    """Print what a run came to: the adapter, the proof, the answers, and how to go on."""
    adapter, name = facts["adapter"], facts["workspace"]
    program = _program("kaito-flows")
    evaluation = facts["metrics"]["evaluation"]
    before, after = evaluation.get("before"), evaluation.get("after")
    line()
    if facts["reused"]:
        line("nothing to train: an adapter with the same inputs was there already")
    line(f"adapter   {adapter['reference']}")
    line(f"digest    {adapter['digest']}")
    if before and after:
        line(f"held out  loss {before['loss']:.3f} before, {after['loss']:.3f} after")
    if answers := facts.get("answers"):
        asked = next(m["content"] for m in reversed(answers["messages"]) if m["role"] == "user")
        system = next((m["content"] for m in answers["messages"] if m["role"] == "system"), None)
        line(f"prompt    {_one_line(asked)}")
        line(f"  base    {_one_line(answers['base'])}")
        line(f"  tuned   {_one_line(answers['tuned'])}")
        line(f"  data    {_one_line(answers['expected'])}")
        line()
        option = f" --system {shlex.quote(system)}" if system else ""
        line(f"chat      {program} chat {name}{option} {shlex.quote(asked)}")
        line(f"or        curl {facts['service']['url']}/chat -H 'Content-Type: application/json' \\")
        line(f"            -d {shlex.quote(json.dumps({'messages': answers['messages']}))}")
        line(f"stop      {program} delete {name}")
    for text in _where_to_look(facts["flow_run_id"]):
        line(text)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in facts["seconds"].items())
    line(f"time      {times}")


def _where_to_look(flow_run_id: str) -> list[str]:
    api = os.environ.get("PREFECT_API_URL", "")
    if api:
        return [f"look at   {api.removesuffix('/api')}/runs/flow-run/{flow_run_id}"]
    start = f"look at   {_program('prefect')} server start"
    return [start, f"            then open http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"]


def _program(name: str) -> str:
    """The program as it must be typed here: by its name where the shell finds it, else by its path."""
    own = Path(sys.argv[0]).with_name(name)
    if any(Path(folder) == own.parent for folder in os.environ.get("PATH", "").split(os.pathsep)) or not own.exists():
        return name
    return str(own)


def _one_line(text: str) -> str:
    return " ".join(text.split())
