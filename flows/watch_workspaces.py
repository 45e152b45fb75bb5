"""The service `watch-workspaces`: it sees Workspaces in the cluster, and sees to it that each generation has its run.

    Workspace ──► valid? ──► suspended, paused? ──► older runs cancelled ──► its run, by its idempotency key
                    └─ no: a condition and an Event, no run

It keeps nothing: what is to be done follows from the object and from Prefect's runs, so that it can be killed at any
moment and start again. It does not poll; Kopf holds a watch on the API server open.

    kaito-flows watch --namespace NS        python -m kaito_flows.flows.watch_workspaces NS
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from prefect import tags
from prefect.exceptions import PrefectException
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    get_current_settings,
    temporary_settings,
)

from kaito_flows.errors import Fault, InputError, KaitoFlowsError
from kaito_flows.flows.automations import HEARTBEAT
from kaito_flows.flows.delete_workspace import delete_workspace, platform_in
from kaito_flows.flows.watching import status
from kaito_flows.flows.watching.endings import Endings
from kaito_flows.flows.watching.memory import LastHandled, Progress
from kaito_flows.flows.watching.metrics import WorkspaceMetrics
from kaito_flows.flows.watching.runs import PAUSED, Deployments, Runs
from kaito_flows.flows.watching.slim_kopf import kopf
from kaito_flows.flows.watching.wish import PREFIX, Wish, faults_of, message_of, shortened
from kaito_flows.settings import Settings

FINALIZER = PREFIX + "finalizer"

_LONGEST_DELAY = 60.0
_TRIES = 3
# A run in a pod stops its job itself. Its successor waits so long for that, and deletion (30 s in all) so long.
_SECONDS_TO_STOP = 10.0
_SECONDS_TO_STOP_BEFORE_DELETION = 6.0

# A request that fails is made again by the watcher, with a condition that says so; Prefect's client would be silent for
# a minute, and wait for an answer as long: a deletion has half of that. And a deletion whose watcher is killed is to be
# seen as crashed.
_PREFECT: dict[Any, Any] = {
    PREFECT_CLIENT_MAX_RETRIES: 0,
    PREFECT_API_REQUEST_TIMEOUT: 10.0,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY: int(HEARTBEAT.total_seconds()),
}

logger = logging.getLogger("kaito_flows.watch")


class Watcher:
    """The handlers. Each looks at the whole object and does what is left to do, however often it is called."""

    def __init__(self, runs: Runs, handled: LastHandled) -> None:
        self.runs = runs
        self.handled = handled
        self.endings = Endings(runs)

    async def start(self, **_: Any) -> None:
        """Make the client for Prefect, and listen to its events."""
        await self.runs.open()
        self.endings.start()

    async def stop(self, **_: Any) -> None:
        """Close its connections."""
        await self.endings.stop()
        await self.runs.close()

    async def reconcile(self, body: kopf.Body, patch: kopf.Patch, retry: int, **_: Any) -> None:
        """Bring Prefect's runs to what the Workspace asks for."""
        wish, faults = Wish.of(body), faults_of(body)
        try:
            await (self._refuse(wish, faults, body, patch) if faults else self._reconcile(wish, body, patch))
        except KaitoFlowsError as exc:
            delay = _delay(retry)
            _log(wish, f"{exc}; again in {delay:.0f} s", logging.WARNING)
            if not faults and not status.has_run(body, wish.generation):
                reason = "".join(word.capitalize() for word in exc.code.split("-"))
                _tell(body, patch, status.told(reason, shortened(str(exc)), wish.generation))
            raise kopf.TemporaryError(exc.code, delay=delay) from exc

    async def delete(self, body: kopf.Body, retry: int, **_: Any) -> None:
        """Stop the Workspace's runs and remove what they made; the finalizer goes when that is done."""
        wish = Wish.of(body)
        if await self.runs.answers():
            try:
                stopped = await self.runs.stop(wish, "the Workspace was deleted", all_of_them=True)
                await self.runs.settled(wish, stopped, _SECONDS_TO_STOP_BEFORE_DELETION)
            except KaitoFlowsError as exc:
                _log(wish, f"{exc}; deleted all the same", logging.WARNING)
            work: Callable[[str, str, str], object] = _as_flow_run
        else:
            _log(wish, "Prefect does not answer: deleted without a flow run", logging.WARNING)
            work = delete_workspace.fn
        try:
            removed = await asyncio.to_thread(work, wish.namespace, wish.name, wish.uid)
        except KaitoFlowsError as exc:
            delay = _delay(retry, longest=10.0)
            _log(wish, f"{exc}; again in {delay:.0f} s", logging.WARNING)
            kopf.warn(body, reason="DeletionFailed", message=shortened(str(exc)))
            raise kopf.TemporaryError(exc.code, delay=delay) from exc
        self.handled.forget(wish.uid)
        _log(wish, f"deleted: {removed}")

    async def follow(self, body: kopf.Body, patch: kopf.Patch, stopped: kopf.DaemonStopped, **_: Any) -> None:
        """Tell what becomes of a run that cannot say it; Kopf stops it when the status says how the run ended."""
        while not stopped:
            news = self.endings.of(status.awaited_run(body))
            if news is not None and _tell(body, patch, status.became(news)):
                kind = "Normal" if news.state == "Stopped" else "Warning"
                kopf.event(body, type=kind, reason=news.reason if news.ended else "RunWaits", message=news.message)
                _log(Wish.of(body), news.message, logging.WARNING, run=news.flow_run_id)
                # Kopf sends the patch when the handler is left, and calls it again.
                raise kopf.TemporaryError("told", delay=2)
            await stopped.wait(1)

    async def _refuse(self, wish: Wish, faults: tuple[Fault, ...], body: kopf.Body, patch: kopf.Patch) -> None:
        message = message_of(faults)
        if _tell(body, patch, status.told("InvalidWorkspace", message, wish.generation, state="Failed")):
            kopf.warn(body, reason="InvalidWorkspace", message=message)
            _log(wish, f"invalid: {message}")
        if wish.generation > 1:
            stopped = await self.runs.stop(wish, "the Workspace was changed, and is not valid")
            await self._end_jobs(wish, stopped)

    async def _reconcile(self, wish: Wish, body: kopf.Body, patch: kopf.Patch) -> None:
        if wish.paused:
            if stopped := await self.runs.pause(wish):
                await self._end_jobs(wish, stopped)
                kopf.event(body, type="Normal", reason="RunPaused", message=f"flow run {', '.join(stopped)}: {PAUSED}")
            if not status.is_settled(body, wish.generation):
                message = f"annotation {PREFIX}pause: goes on when it is taken away"
                _tell(body, patch, status.told("workspacePaused", message, wish.generation))
            return
        stopped = await self.runs.stop(wish, "the Workspace was changed")
        if wish.suspended:
            await self._end_jobs(wish, stopped)
            if not status.has_run(body, wish.generation):
                message = f"annotation {PREFIX}suspend: nothing is started"
                _tell(body, patch, status.told("workspaceSuspended", message, wish.generation))
            return
        await self._end_jobs(wish, stopped)
        run = await self.runs.ensure(wish, body)
        if run.queued and _tell(body, patch, status.queued(run.id, wish.generation)):
            kopf.event(body, type="Normal", reason="RunCreated", message=f"flow run {run.id}")
            _log(wish, f"run {run.id} for generation {wish.generation}", run=run.id, cancelled=stopped)
        await self.endings.learn(run.id, run.state)

    async def _end_jobs(self, wish: Wish, stopped: list[str]) -> None:
        """See that no job works on for runs that were stopped: one whose pod is gone cannot stop its own."""
        if stopped:
            await self.runs.settled(wish, stopped, _SECONDS_TO_STOP)
            await asyncio.to_thread(lambda: platform_in(wish.namespace).stop_jobs(wish.name))


def registry_of(watcher: Watcher, metrics: WorkspaceMetrics) -> kopf.OperatorRegistry:
    """Kopf's registry with the watcher's handlers."""
    registry = kopf.OperatorRegistry()
    resource = ("kaito.sh", "v1beta1", "workspaces")
    metrics.watch(registry, *resource)
    kopf.on.login(registry=registry)(_login)
    kopf.on.startup(registry=registry, id="start")(watcher.start)
    kopf.on.cleanup(registry=registry, id="stop")(watcher.stop)
    kopf.on.create(*resource, registry=registry, id="reconcile")(watcher.reconcile)
    kopf.on.update(*resource, registry=registry, id="reconcile")(watcher.reconcile)
    kopf.daemon(*resource, registry=registry, id="follow", when=_awaits, cancellation_timeout=1.0)(watcher.follow)
    kopf.on.delete(*resource, registry=registry, id="delete")(watcher.delete)
    return registry


def settings_of(handled: LastHandled, *, dynamic: bool) -> kopf.OperatorSettings:
    """Kopf's settings: nothing is written but what the watcher has to say, nothing read that is not Workspaces."""
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = FINALIZER
    settings.persistence.diffbase_storage = handled
    settings.persistence.progress_storage = Progress()
    settings.posting.reporting_component = "kaito-flows"
    settings.posting.event_name_prefix = "kaito-flows-"
    settings.peering.standalone = True
    # Who follows a run stops at once when told, but many take longer than Kopf's ten rounds of the loop.
    settings.background.instant_exit_timeout = 1.0
    # To look for new CRDs and namespaces takes rights in the whole cluster.
    settings.scanning.disabled = not dynamic
    return settings


def watch(
    namespaces: Sequence[str],
    *,
    deployments: Deployments | None = None,
    liveness: str | None = None,
) -> None:
    """Watch the Workspaces of these namespaces, or of all when none is named, until SIGTERM or Ctrl-C.

    Args:
        namespaces: where to look; with none, the rights have to be cluster-wide.
        deployments: the names of the deployments that Workspaces are run by.
        liveness: where to answer a pod's liveness probe, as a URL: `http://0.0.0.0:8080/healthz`.

    Raises:
        InputError: PREFECT_API_URL is not set.
        PortTakenError: another process listens at KAITO_FLOWS_METRICS_PORT.
    """
    if get_current_settings().api.url is None:
        hint = "export PREFECT_API_URL=http://prefect-server:4200/api"
        raise InputError("is not set: the watcher starts runs there", place="PREFECT_API_URL", hint=hint, code="usage")
    logging.getLogger().handlers.clear()  # Prefect's: every line would be there twice
    kopf.configure(log_format=kopf.LogFormat.FULL if sys.stderr.isatty() else kopf.LogFormat.JSON)
    for chatty in ("kopf", "httpx", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("prefect").propagate = False  # the log of a deletion is in Prefect; here is one line of it
    # Said already, with what is behind it; what nobody foresaw keeps its traceback.
    logging.getLogger("kopf.objects").addFilter(lambda record: "failed temporarily" not in record.getMessage())
    handled = LastHandled()
    watcher, metrics = Watcher(Runs(deployments or Deployments()), handled), WorkspaceMetrics()
    _log_line(f"watching Workspaces in {', '.join(namespaces) or 'all namespaces'}")
    with metrics.served(Settings().metrics_port), temporary_settings(_PREFECT):
        kopf.run(
            registry=registry_of(watcher, metrics),
            settings=settings_of(handled, dynamic=not namespaces),
            namespaces=list(namespaces),
            clusterwide=not namespaces,
            standalone=True,
            liveness_endpoint=liveness,
        )


def _awaits(body: kopf.Body, **_: Any) -> bool:
    """Whether the Workspace has a run of which nobody knows yet how it ends."""
    return bool(status.awaited_run(body))


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """The service account in a pod; elsewhere the kubeconfig."""
    found = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
    if found is None or not (found.token or found.username or found.certificate_path or found.certificate_data):
        # A program has to be asked for a token (AKS with Entra ID): the official client can, and takes its time.
        return kopf.login_via_client(**kwargs)
    return found


def _as_flow_run(namespace: str, name: str, uid: str) -> object:
    """Run `delete-workspace` as a flow run; without Prefect, should it go away meanwhile."""
    for attempt in range(_TRIES):
        try:
            # Not with the tag by which crashed runs are resumed: the watcher itself does it again.
            with tags(f"workspace:{namespace}/{name}"):
                return delete_workspace(namespace, name, uid)
        except (httpx.HTTPError, PrefectException, RuntimeError) as exc:
            # Prefect on SQLite is too busy now and then, for a moment.
            if not _is_busy(exc) or attempt + 1 == _TRIES:
                break
            time.sleep(1 + attempt)
    return delete_workspace.fn(namespace, name, uid)


def _is_busy(exc: Exception) -> bool:
    return isinstance(exc, httpx.HTTPStatusError) and exc.response.status_code in (429, 503)


def _delay(retry: int, *, longest: float = _LONGEST_DELAY) -> float:
    """Seconds until the next try: 1, 2, 4 and so on, not all at the same moment."""
    return min(longest, 2.0 ** min(retry, 10)) * (0.75 + random.random() / 2)


def _tell(body: kopf.Body, patch: kopf.Patch, change: status.Change) -> bool:
    """Make the change to the object, if it is one; say whether it is."""
    if status.changes(change, body):
        patch.fns.append(change)
        return True
    return False


def _log(wish: Wish, message: str, level: int = logging.INFO, **facts: Any) -> None:
    extra = {"workspace": f"{wish.namespace}/{wish.name}", **{k: v for k, v in facts.items() if v}}
    logger.log(level, "%s/%s: %s", wish.namespace, wish.name, message, extra=extra)


def _log_line(message: str) -> None:
    logger.info(message)


if __name__ == "__main__":
    watch(sys.argv[1:])
