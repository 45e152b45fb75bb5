"""The commands `nodes`: which nodes are rented, for whom and until when; remove those that nobody answers for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaito_flows.cli import failures, output
from kaito_flows.errors import InputError

if TYPE_CHECKING:
    from kaito_flows.nodes.pools import Pool
    from kaito_flows.nodes.renting import RentedNodes
    from kaito_flows.settings import Settings

nodes = typer.Typer(rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Output = Annotated[str, typer.Option("-o", "--output", help="json: the same as --json.")]


@nodes.callback(invoke_without_command=True)
def _list(context: typer.Context, as_json: AsJson = False, form: Output = "") -> None:
    """List the rented nodes, or give them back.

    COST is in USD, so far. `nodes reap` removes what no run answers for, `nodes release NAME` one lease.
    """
    if context.invoked_subcommand is not None:
        return
    from kaito_flows.nodes.listing import columns, facts

    as_json = _is_json(form, as_json)
    rented, settings = _rented()
    found = [(pool, provider.cloud) for provider in rented for pool in provider.pools()]
    if as_json:
        output.json_facts([facts(pool, cloud.kind, cloud.now()) for pool, cloud in found])
    elif found:
        output.table([columns(pool, cloud.now()) for pool, cloud in found])
    else:
        _nothing(rented, settings)


@nodes.command()
def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
    form: Output = "",
) -> None:
    """Remove rented nodes whose lease has run out, or whose run is over.

    The flow reap-nodes does it every five minutes. Where PREFECT_API_URL is not set, or Prefect does not answer, only
    what ran out more than one lease ago is removed.
    """
    as_json = _is_json(form, as_json)
    rented, settings = _rented()
    if not rented:
        if as_json:
            output.json_facts([])
        else:
            _nothing(rented, settings)
        return
    from kaito_flows.cluster.gateway import Cluster
    from kaito_flows.tasks import reap as reaping

    report = reaping.reap(rented, Cluster.connect(), settings, dry_run=dry_run, remove=reaping.remove_pool.fn)
    if as_json:
        output.json_facts([{key.lower(): value for key, value in found.row.items()} for found in report.reaped])
    for found in () if as_json else report.reaped:
        output.line(found.line)
    if not report.reaped and not as_json and not report.unasked:
        _nothing(rented, settings)
    report.raise_if_incomplete()


@nodes.command()
def release(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The lease's name, as `kaito-flows nodes` has it.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a lease back now, whoever holds it."""
    rented, settings = _rented()
    found = [(pool, provider) for provider in rented for pool in provider.pools() if pool.name == name]
    if not found:
        hint = "kaito-flows nodes lists them" if rented else f"KAITO_FLOWS_NODES is {settings.nodes}: nothing is rented"
        raise InputError("no such lease", place=repr(name), hint=hint, code="lease-not-found")
    if not yes:
        _confirm(found[0][0])
    for pool, provider in found:
        provider.cloud.delete(pool)
    if as_json:
        output.json_facts({"released": name})
    else:
        output.line(f"released {name}: it is being removed")


def _confirm(pool: Pool) -> None:
    if not sys.stdin.isatty():
        raise InputError("asks before it removes nodes", place="nodes release", hint="--yes answers", code="usage")
    holder = pool.record.holder
    who = f"{holder.namespace}/{holder.workspace}"
    if pool.record.state == "leased":
        output.line(f"flow run {holder.run_id} of {who} holds it, and would lose its nodes")
    else:
        output.line(f"it is {pool.record.state} for {who}")
    if not typer.confirm(f"release {pool.name}?"):
        output.line("nothing was released")
        raise typer.Exit(1)


def _rented() -> tuple[list[RentedNodes], Settings]:
    from pydantic import ValidationError

    from kaito_flows.nodes.opening import open_rented
    from kaito_flows.settings import Settings

    try:
        settings = Settings()
    except ValidationError as exc:
        raise failures.from_settings(exc) from exc
    return open_rented(settings), settings


def _nothing(rented: list[Any], settings: Settings) -> None:
    from kaito_flows.nodes.listing import nothing_rented

    output.line("no node is rented" if rented else nothing_rented(settings))


def _is_json(form: str, as_json: bool) -> bool:
    if form not in ("", "json"):
        raise InputError(f"{form!r} is no form of output", place="--output", hint="json", code="usage")
    return as_json or form == "json"
