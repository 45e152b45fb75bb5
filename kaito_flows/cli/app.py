"""The commands, each with `--json` where it prints facts. Exit code 2: what the user wrote; 1: what failed; 0: done."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaito_flows import __version__
from kaito_flows.cli import output
from kaito_flows.errors import InputError, KaitoFlowsError, WorkspaceError

if TYPE_CHECKING:
    from kaito_flows.planning.plan import Plan
    from kaito_flows.platforms.local import LocalPlatform
    from kaito_flows.workspace import WorkspaceFile

app = typer.Typer(
    name="kaito-flows",
    help="KAITO workspaces as Prefect flows: plan, tune, publish, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file with a Workspace (and its ConfigMap).")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The Workspace's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="The service's port; default: a free one.")]


def main() -> None:
    """Run the command line; an error that kaito-flows raises on purpose is one line and an exit code."""
    try:
        app(standalone_mode=False)
    except KaitoFlowsError as exc:
        output.error(exc, as_json="--json" in sys.argv)
        sys.exit(exc.exit_code)
    except typer.Exit as exc:
        sys.exit(exc.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as exc:
        # Click's own complaints (no such option) know how to show themselves.
        show = getattr(exc, "show", None)
        if show is None:
            raise
        show()
        sys.exit(getattr(exc, "exit_code", 2))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        output.line(__version__)
        raise typer.Exit


@app.command()
def validate(file: File, as_json: AsJson = False) -> None:
    """Check a Workspace file: every fault at once, each with its place."""
    from kaito_flows.workspace import load_workspace

    loaded = load_workspace(file, "local")
    workspace = loaded.workspace
    if as_json:
        warnings = [str(fault) for fault in loaded.placeholders]
        output.json_facts({"valid": True, "name": workspace.name, "kind": workspace.api_version, "warnings": warnings})
        return
    for fault in loaded.placeholders:
        output.warning(str(fault))
    output.line(f"{file}: Workspace {workspace.name} ({workspace.api_version}) is valid")


@app.command()
def plan(
    file: File,
    as_json: AsJson = False,
    platform: Annotated[
        str, typer.Option("--platform", help="local or kubernetes; default: by whether the file names a size.")
    ] = "",
    data: Annotated[bool, typer.Option("--data", help="Prepare the data too: steps, time, cost, identity.")] = False,
) -> None:
    """Say what a Workspace will take: memory, GPU sizes that fit, price; steps and time once its data is prepared."""
    from kaito_flows.planning.plan import plan_workspace
    from kaito_flows.workspace import load_workspace

    if platform not in ("", "local", "kubernetes"):
        raise InputError(f"{platform!r} is no platform", place="--platform", hint="local or kubernetes")
    loaded = load_workspace(file, "kubernetes" if platform == "kubernetes" else "local")
    sized = bool(loaded.workspace.resource.instance_type)
    made = plan_workspace(loaded, "kubernetes" if platform == "kubernetes" or (sized and not platform) else "local")
    if data:
        made = _with_data(loaded, made)
    if as_json:
        output.json_facts(made.as_dict())
        return
    for note in (*map(str, loaded.placeholders), *made.notes):
        output.warning(note)
    output.pairs(made.table_rows(), title=f"Plan of {made.workspace}")


@app.command()
def tune(
    file: File,
    as_json: AsJson = False,
    serve: Annotated[bool | None, typer.Option("--serve/--no-serve", help="Roll the adapter out.")] = None,
    port: Port = None,
    print_parameters: Annotated[
        bool, typer.Option("--print-parameters", help="Only print the flow's parameters, for a deployment.")
    ] = False,
) -> None:
    """Tune, publish and serve what a Workspace file says, on this machine."""
    from kaito_flows.workspace import load_workspace

    loaded = load_workspace(file, "local")
    if loaded.placeholders:
        raise WorkspaceError(loaded.placeholders, source=str(file))
    parameters = loaded.as_parameters() | ({} if serve is None else {"serve": serve}) | ({"port": port} if port else {})
    if print_parameters:
        output.json_facts(parameters)
        return
    _quiet_prefect()
    from kaito_flows.cli.live import Live
    from kaito_flows.flows.tune_workspace import tune_workspace
    from kaito_flows.tasks.progress import listening

    with Live(quiet=as_json) as live, listening(live.on_event):
        try:
            facts = tune_workspace(**parameters)
        except KeyboardInterrupt:
            stopped = _platform().stop_jobs(loaded.workspace.name)
            output.warning(f"interrupted; stopped {', '.join(stopped) or 'nothing'}; run it again to go on from there")
            raise typer.Exit(130) from None
    if as_json:
        output.json_facts(facts)
    else:
        output.summary(facts)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One Workspace; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known of Workspaces, with KAITO's columns."""
    from kaito_flows.workspace.status import WorkspaceStatus, columns

    platform = _platform()
    found = platform.statuses() if name is None else [s for s in [platform.read_status(name)] if s]
    if name is not None and not found:
        raise InputError(
            f"no Workspace {name!r} on this machine", hint="kaito-flows status", code="workspace-not-found"
        )
    services = {str(s["name"]): platform.service(str(s["name"])) for s in found}
    if as_json:
        output.json_facts([{**s, "service_url": _url(services[s["name"]])} for s in found])
        return
    statuses = [WorkspaceStatus.from_dict(s) for s in found]
    for version in sorted({s.api_version for s in statuses}):
        output.table([columns(s) for s in statuses if s.api_version == version])
    if not statuses:
        output.line("no Workspaces on this machine")
    if name is not None:
        for condition in statuses[0].conditions.values():
            output.line(f"{condition.type}={condition.status} {condition.reason} {condition.message}".rstrip())
        output.line(f"service: {_url(services[name]) or 'not up'}")


@app.command()
def chat(
    name: Name,
    prompt: Annotated[str | None, typer.Argument(help="What to ask; default: a conversation.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Talk to a tuned model, or to its base."""
    from kaito_flows.chat import ask

    service = _platform().service(name)
    if service is None:
        raise InputError(
            f"no service of {name!r} is up", hint="kaito-flows tune FILE rolls it out", code="service-not-found"
        )
    model = service.models[0] if base else service.models[-1]
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        answer = ask(service.url, model, [*messages, {"role": "user", "content": prompt}], max_tokens=max_tokens)
        facts = {"model": model, "prompt": prompt, "answer": answer, "url": service.url}
        output.json_facts(facts) if as_json else output.line(answer)
        return
    output.line(f"{model} at {service.url}; an empty line ends")
    while text := typer.prompt("you", default="", show_default=False).strip():
        messages.append({"role": "user", "content": text})
        answer = ask(service.url, model, messages, max_tokens=max_tokens)
        messages.append({"role": "assistant", "content": answer})
        output.line(answer)


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Stop a Workspace's jobs and its service, and forget it; published images stay."""
    platform = _platform()
    known = platform.read_status(name) is not None or platform.service(name) is not None
    stopped = platform.delete(name)
    if not known and not stopped:
        raise InputError(
            f"no Workspace {name!r} on this machine", hint="kaito-flows status", code="workspace-not-found"
        )
    if as_json:
        output.json_facts({"deleted": name, "stopped": stopped})
    else:
        output.line(f"deleted {name}" + (f": stopped {', '.join(stopped)}" if stopped else ""))


def _with_data(loaded: WorkspaceFile, made: Plan) -> Plan:
    """Prepare the dataset as a run would, and refine the plan by it; the run then finds it."""
    from kaito_flows.dataset import DatasetParameters, fetch, prepare_dataset
    from kaito_flows.planning.plan import DatasetFacts

    tuning, platform = loaded.workspace.tuning, _platform()
    if tuning is None or not tuning.input.urls or not tuning.output.image:
        raise InputError("only data behind input.urls can be prepared here", place="--data", code="not-supported")
    source = made.preset.source.model_dump(mode="json", exclude_none=True)
    folder = platform.ensure_weights(made.preset.name, source, lambda event: None)
    files = fetch(tuning.input.urls, platform.downloads, allow_files=True)
    layout = platform.repository(tuning.output.image)
    dataset = prepare_dataset(files, folder, DatasetParameters.from_config(made.config), layout)
    return made.with_dataset(DatasetFacts.of(dataset.image.digest, dataset.facts))


def _platform() -> LocalPlatform:
    from kaito_flows.platforms.local import LocalPlatform
    from kaito_flows.settings import Settings

    return LocalPlatform(Settings())


def _url(service: Any) -> str | None:
    return service.url if service else None


def _quiet_prefect() -> None:
    # The run's log goes to Prefect's server as always; the terminal has its own view of the run.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
