"""The command `watch`: the service that runs in the cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from kaito_flows.errors import InputError
from kaito_flows.settings import Settings


def watch(
    namespace: Annotated[
        list[str] | None,
        typer.Option("--namespace", "-n", envvar="KAITO_FLOWS_NAMESPACE", help="Where to look; can be given again."),
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Look everywhere; takes rights in the whole cluster.")
    ] = False,
    tune_deployment: Annotated[
        str | None, typer.Option("--tune-deployment", envvar="KAITO_FLOWS_TUNE_DEPLOYMENT", help="What runs `tuning`.")
    ] = None,
    serve_deployment: Annotated[
        str | None,
        typer.Option("--serve-deployment", envvar="KAITO_FLOWS_SERVE_DEPLOYMENT", help="What runs `inference`."),
    ] = None,
    liveness: Annotated[
        str | None, typer.Option("--liveness", help="Where to answer liveness probes: http://0.0.0.0:8080/healthz")
    ] = None,
) -> None:
    """Watch the cluster's Workspaces, and start their runs in Prefect."""
    if not namespace and not all_namespaces:
        raise InputError("is missing", place="--namespace", hint="name one, or say --all-namespaces", code="usage")
    try:
        from kaito_flows.flows.watch_workspaces import watch as run
        from kaito_flows.flows.watching.runs import Deployments
    except ModuleNotFoundError as exc:
        hint = "pip install 'kaito-flows[cluster]'"
        raise InputError(f"{exc.name} is not installed", place="kaito-flows watch", hint=hint, code="usage") from exc
    place = Settings().place
    tune, serve = tune_deployment or f"tune-workspace/{place}", serve_deployment or f"serve-workspace/{place}"
    deployments = Deployments(tune=tune, serve=serve)
    run([] if all_namespaces else namespace or [], deployments=deployments, liveness=liveness)
