"""The commands, each with `--json` where it prints facts. Exit code 2: what the user wrote; 1: what failed; 0: done."""

from __future__ import annotations

import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaito_flows import __version__
from kaito_flows.cli import failures, output, renting
from kaito_flows.cli.nodes import nodes
from kaito_flows.cli.watch import watch
from kaito_flows.errors import InputError, KaitoFlowsError, WorkspaceError

if TYPE_CHECKING:
    from kaito_flows.planning.place import Platform as PlatformKind
    from kaito_flows.planning.plan import Measured, Plan
    from kaito_flows.planning.serving import ServingPlan
    from kaito_flows.platforms import Platform
    from kaito_flows.settings import Settings
    from kaito_flows.workspace import WorkspaceFile

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="kaito-flows",
    help="KAITO workspaces as Prefect flows: plan, tune, publish, serve.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file with a Workspace (and its ConfigMap).")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The Workspace's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Namespace = Annotated[
    str,
    typer.Option("-n", "--namespace", help="A namespace of the cluster (means Kubernetes)."),
]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="The service's port; default: a free one.")]


def main() -> None:
    """Run the command line: every failure is one line (with `--json` an object) and an exit code, never a traceback."""
    try:
        # Click hands back the code of a `typer.Exit`, and None from a command that came to its end.
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as exc:  # noqa: BLE001 - whatever it is, a user gets a line and an exit code
        error = exc if isinstance(exc, KaitoFlowsError) else failures.from_exception(exc)
        if os.environ.get(failures.TRACEBACK):
            traceback.print_exception(exc)
        output.error(error, as_json=_wants_json(sys.argv))
        sys.exit(error.exit_code)


def _wants_json(arguments: list[str]) -> bool:
    named = itertools.pairwise(arguments)
    return "--json" in arguments or any(pair in (("-o", "json"), ("--output", "json")) for pair in named)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        output.line(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        output.line(context.get_help())
        raise typer.Exit(2)


@app.command()
def validate(file: File, as_json: AsJson = False) -> None:
    """Check a Workspace file, and name every fault at once."""
    from kaito_flows.workspace import load_workspace

    loaded = load_workspace(file, _settings().platform)
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
        str, typer.Option("--platform", help="local or kubernetes; default: as set, or by whether a size is named.")
    ] = "",
    data: Annotated[bool, typer.Option("--data", help="Prepare the data too: steps, time, cost, identity.")] = False,
) -> None:
    """Say what a Workspace will take, before anything starts.

    Memory, the GPU sizes that fit, their price; with --data also steps, time, cost and the run's identity. Where the
    settings rent nodes, also which would be tried, in which order, and which of them cannot be had now.
    """
    from kaito_flows.planning.plan import plan_rented, plan_workspace
    from kaito_flows.planning.serving import plan_serving
    from kaito_flows.workspace import load_workspace

    if platform not in ("", "local", "kubernetes"):
        raise InputError(f"{platform!r} is no platform", place="--platform", hint="local or kubernetes")
    settings = _settings().model_copy(update={"platform": platform} if platform else {})
    loaded = load_workspace(file, settings.platform)
    sized = bool(loaded.workspace.resource.instance_type)
    there: PlatformKind = "kubernetes" if sized and not platform else settings.platform
    made: Plan | ServingPlan
    if loaded.workspace.tuning is None:
        made = plan_serving(loaded, there, gpus=loaded.workspace.gpus)
        if data:
            raise InputError("a service has no data to prepare", place="--data", code="not-supported")
    else:
        measured = _measured_before()
        if settings.rents:
            made = plan_rented(loaded, measured=measured)
        else:
            made = plan_workspace(loaded, there, gpus=loaded.workspace.gpus, measured=measured)
        made = _with_data(loaded, made) if data else made
    places = renting.places_of(loaded, settings)
    if as_json:
        found = renting.prospects_of(loaded, made, settings)
        offered = {"offers": [each.as_dict() for each in found], "elsewhere": list(places)}
        output.json_facts(made.as_dict() | (offered if settings.rents else {}))
        if settings.rents and not renting.is_any_left(found, places, settings):
            raise typer.Exit(1)
        return
    for note in (*map(str, loaded.placeholders), *made.notes):
        output.warning(note)
    output.pairs(made.table_rows(), title=f"Plan of {made.workspace}")
    if settings.rents:  # after the plan, which holds whether or not the cloud answers
        renting.show(renting.prospects_of(loaded, made, settings), places, settings)


@app.command()
def tune(
    file: File,
    as_json: AsJson = False,
    serve: Annotated[bool | None, typer.Option("--serve/--no-serve", help="Roll the adapter out.")] = None,
    port: Port = None,
    print_parameters: Annotated[
        bool, typer.Option("--print-parameters", help="Only print the flow's parameters, for a deployment.")
    ] = False,
    namespace: Namespace = "",
) -> None:
    """Tune, publish and serve a Workspace.

    On this machine; with --namespace or KAITO_FLOWS_PLATFORM=kubernetes, in the cluster of the kubeconfig.
    """
    from kaito_flows.workspace import load_workspace

    if namespace:
        os.environ["KAITO_FLOWS_PLATFORM"] = "kubernetes"  # the flow has its settings from there
    loaded = load_workspace(file, _settings().platform)
    if namespace:
        loaded.workspace.metadata.namespace = namespace
    if loaded.placeholders:
        raise WorkspaceError(loaded.placeholders, source=str(file))
    parameters = loaded.as_parameters() | ({} if serve is None else {"serve": serve}) | ({"port": port} if port else {})
    if print_parameters:
        output.json_facts(parameters)
        return
    platform = _platform(loaded.workspace.namespace)
    _quiet_prefect()
    from prefect.settings import get_current_settings

    from kaito_flows.cli.live import Live
    from kaito_flows.flows.tune_workspace import tune_workspace
    from kaito_flows.tasks.progress import listening

    with Live(quiet=as_json) as live, listening(live.on_event):
        if get_current_settings().api.url is None:
            live.starting_server()
        try:
            facts = tune_workspace(**parameters)
        except KeyboardInterrupt:
            live.close()
            platform.stop_jobs(loaded.workspace.name)
            output.warning("interrupted; run it again to go on from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        output.json_facts(facts)
    else:
        output.summary(facts)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One Workspace; default: all.")] = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on, with a line for each change.")] = False,
    namespace: Namespace = "",
) -> None:
    """Show what is known of Workspaces, with KAITO's columns."""
    from kaito_flows.workspace.status import columns, cost_words

    platform = _platform(namespace)
    found = platform.statuses() if name is None else [s for s in [platform.read_status(_known(name))] if s]
    if name is not None and not found:
        raise _not_known(name)
    if watch:
        output.follow(platform.watch_statuses(name or ""))
        return
    services = {s.name: platform.service(s.name) for s in found} if as_json or name is not None else {}
    if as_json:
        output.json_facts([{**s.as_dict(), "service_url": _url(services[s.name])} for s in found])
        return
    for version in sorted({s.api_version for s in found}):
        output.table([columns(s) for s in found if s.api_version == version])
    if not found:
        output.line("no Workspaces on this machine" if platform.kind == "local" else "no Workspaces in the namespace")
    if name is not None:
        conditions = found[0].conditions.values()
        rows = [{"item": c.type, "value": f"{c.status:<7} {c.reason} {c.message}".rstrip()} for c in conditions]
        rows.append({"item": "service", "value": _url(services[name]) or "not up"})
        if (cost := found[0].facts.get("cost")) and (cost.get("usd") != 0 or cost.get("gpu_hours")):
            rows.append({"item": "cost", "value": cost_words(cost)})
        output.pairs(rows)


@app.command()
def chat(
    name: Name,
    prompt: Annotated[str | None, typer.Argument(help="What to ask; default: a conversation.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 256,
    as_json: AsJson = False,
    namespace: Namespace = "",
) -> None:
    """Talk to a tuned model, or to its base."""
    from kaito_flows.chat import ask

    if as_json and prompt is None:
        raise InputError("needs a PROMPT", place="--json", hint="a conversation is for a terminal", code="usage")
    platform = _platform(namespace)
    service = platform.service(_known(name))
    if service is None:
        raise InputError(
            "no service of this Workspace is up",
            place=name,
            hint="kaito-flows tune FILE rolls it out",
            code="service-not-found",
        )
    model = service.models[0] if base else service.models[-1]
    messages = [{"role": "system", "content": system}] if system else []
    with platform.client(service) as http:
        if prompt is not None:
            answer = ask(http, model, [*messages, {"role": "user", "content": prompt}], max_tokens=max_tokens)
            facts = {"model": model, "prompt": prompt, "answer": answer, "url": service.url}
            if as_json:
                output.json_facts(facts)
            else:
                _say(answer)
            return
        output.line(f"{model} at {service.url}; an empty line ends")
        while text := _read():
            messages.append({"role": "user", "content": text})
            answer = ask(http, model, messages, max_tokens=max_tokens)
            messages.append({"role": "assistant", "content": answer})
            _say(answer)


@app.command()
def delete(name: Name, as_json: AsJson = False, namespace: Namespace = "") -> None:
    """Stop a Workspace's jobs and service, and forget it.

    Its rented nodes are given back. Published images stay.
    """
    platform = _platform(namespace)
    known = platform.read_status(_known(name)) is not None or platform.service(name) is not None
    stopped = platform.delete(name)
    if not known and not stopped:
        raise _not_known(name)
    _release_nodes(platform, name)
    if as_json:
        output.json_facts({"deleted": name, "stopped": stopped})
    else:
        output.line(f"deleted {name}" + (f": stopped {', '.join(stopped)}" if stopped else ""))


app.command()(watch)
app.add_typer(nodes, name="nodes")


def _measured_before() -> Measured:
    """What runs on the Prefect server at `PREFECT_API_URL` were seen to take; without one, nothing is known."""
    if not os.environ.get("PREFECT_API_URL"):
        return lambda _: None
    from kaito_flows.tasks.measured import memory_share

    return memory_share


def _with_data(loaded: WorkspaceFile, made: Plan) -> Plan:
    """Prepare the dataset as a run would, and refine the plan by it; the run then finds it."""
    from kaito_flows.dataset import DatasetParameters, fetch, prepare_dataset
    from kaito_flows.planning.plan import DatasetFacts
    from kaito_flows.tasks.weights import weights_of

    tuning, platform = loaded.workspace.tuning, _platform()
    if tuning is None or not tuning.input.urls or not tuning.output.image:
        raise InputError("only data behind input.urls can be prepared here", place="--data", code="not-supported")
    folder = platform.ensure_weights(weights_of(made, loaded.workspace), lambda event: None)
    files = fetch(tuning.input.urls, platform.downloads, allow_files=True)
    repository = platform.repository(tuning.output.image)
    dataset = prepare_dataset(files, folder, DatasetParameters.from_config(made.config), repository)
    return made.with_dataset(DatasetFacts.of(dataset.image.digest, dataset.facts))


def _release_nodes(platform: Platform, name: str) -> None:
    if platform.kind == "kubernetes":
        from kaito_flows.nodes.opening import release_all
        from kaito_flows.platforms.kubernetes import KubernetesPlatform

        assert isinstance(platform, KubernetesPlatform)
        release_all(_settings(), platform.cluster.namespace, name)


def _settings() -> Settings:
    from pydantic import ValidationError

    from kaito_flows.settings import Settings

    try:
        return Settings()
    except ValidationError as exc:
        raise failures.from_settings(exc) from exc


def _platform(namespace: str = "") -> Platform:
    """The platform of the settings; who names a namespace means the cluster."""
    from kaito_flows.platforms import open_platform

    settings = _settings()
    if namespace and settings.platform == "local" and "KAITO_FLOWS_PLATFORM" not in os.environ:
        settings = settings.model_copy(update={"platform": "kubernetes"})
    return open_platform(settings, namespace)


def _known(name: str) -> str:
    """Return the name, if a Workspace can have it: it becomes part of paths, some of which are removed."""
    if len(name) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        raise _not_known(name)
    return name


def _not_known(name: str) -> InputError:
    return InputError(
        "no such Workspace on this machine",
        place=repr(name),
        hint="kaito-flows status lists them",
        code="workspace-not-found",
    )


def _say(answer: str) -> None:
    output.line(answer)
    if not answer.strip():
        output.warning("the model answered with nothing")


def _read() -> str:
    """What the user says next; "" where they are done, by an empty line or by the end of the input."""
    try:
        return str(typer.prompt("you", default="", show_default=False)).strip()
    except typer.Abort:
        output.line()
        return ""


def _url(service: Any) -> str | None:
    return service.url if service else None


def _quiet_prefect() -> None:
    # The run's log goes to Prefect's server as always; the terminal has its own view of the run.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    # As workers have it: at Prefect's 180 s, the automation that finds runs without a heartbeat would find this one.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
