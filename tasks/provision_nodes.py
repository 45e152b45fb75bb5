"""Provision nodes while the data is prepared, keep them while the run lives, and give them back on every way out."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run as current_run
from prefect.settings import get_current_settings

from kaito_flows.errors import BudgetError, KaitoFlowsError, LeaseLostError, SchedulingError
from kaito_flows.nodes import NodeLease, NodeProvider, NodeRequest
from kaito_flows.nodes.cost import NodeCost, PaidLease
from kaito_flows.nodes.offers import MAX_COST, offers_of
from kaito_flows.planning.plan import Plan
from kaito_flows.planning.serving import ServingPlan
from kaito_flows.platforms import Platform, Service
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import log, stage, tell
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.workspace import Workspace

OnLease = Callable[[NodeLease], None]

RENEW_SECONDS = 30.0
"""How often it is looked whether a lease needs to be renewed; most looks ask nobody anything."""

MAX_LEASES = 10
"""How often a run takes nodes: what is evicted ten times is not meant for spot nodes."""

_STAGE = "provision nodes"


@task(
    name="provision-nodes",
    task_run_name="provision-nodes-{request.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def provision_nodes(
    request: NodeRequest,
    nodes: NodeProvider,
    stop: threading.Event,
    on_lease: OnLease,
    lost: NodeLease | None = None,
) -> NodeLease:
    """Lease the nodes that the Workspace asks for, unless `stop` is set meanwhile; other ones than `lost`."""
    with stage(_STAGE):
        lease = nodes.lease(request.after(lost) if lost else request, _told, stop)
        log(f"nodes: {', '.join(lease.nodes)} ({lease.provider})")
        on_lease(lease)
        return lease


@task(
    name="release-nodes",
    task_run_name="release-nodes-{request.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def release_nodes(request: NodeRequest, nodes: NodeProvider, keep: bool) -> None:
    """Give back all nodes of the run; `keep` lets the Workspace's next run have them, where the settings say so."""
    nodes.release(request.holder, keep=keep)


class Tenancy:
    """The nodes of one run, from when they are asked for to when they are given back.

    As a context manager it gives them back on every way out but one: a run that is killed or evicted comes again, and
    its job goes on meanwhile. (If it does not come, the lease runs out.) `on_cost` hears what they cost, so far;
    `warm_up` is called with rented nodes as soon as they are ready, `stop_job` when they have cost `budget_usd`. When
    it is known that none can be had, `lacking` says why, and nothing is asked for.
    """

    def __init__(
        self,
        request: NodeRequest,
        nodes: NodeProvider,
        *,
        spent: NodeCost | None = None,
        on_cost: Callable[[NodeCost], object] = lambda cost: None,
        warm_up: OnLease = lambda lease: None,
        budget_usd: float | None = None,
        stop_job: Callable[[], object] = lambda: None,
        lacking: SchedulingError | None = None,
    ) -> None:
        self.request = request
        self.cost = spent or NodeCost()
        self._nodes, self._on_cost, self._warm_up = nodes, on_cost, warm_up
        self._budget, self._stop_job, self._lacking = budget_usd, stop_job, lacking
        self._stop = threading.Event()
        self._future: PrefectFuture[NodeLease] | None = None
        self._lease: NodeLease | None = None
        self._since = 0.0
        self._taken = 0
        self._keeper: threading.Thread | None = None
        self._is_used = self._is_spent = self._is_over = False

    def __enter__(self) -> Tenancy:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None or isinstance(exc, Exception):
            self.give_back()
            return
        self._stop.set()
        if isinstance(exc, KeyboardInterrupt):  # nobody resumes what somebody has stopped by hand
            self._nodes.release(self.request.holder)

    def begin(self) -> None:
        """Ask for the nodes, in the background."""
        if self._future is None and self._lease is None and self._lacking is None:
            self._future = provision_nodes.submit(self.request, self._nodes, self._stop, self._book)

    def lease(self) -> NodeLease:
        """Return the nodes, when they are ready; others, when those that the run had are gone.

        Raises:
            SchedulingError: there are none.
            BudgetError: they may cost no more.
            LeaseLostError: (code `too-many-leases`) they were taken away time and again.
        """
        self.check_budget()
        if self._lacking is not None:
            raise self._lacking
        self._is_used = True
        if self._future is not None:
            self._future.result()
            self._future = None
        if self._lease is not None and self._nodes.alive(self._lease):
            return self._lease
        lost = self._lease
        if lost is not None:
            self._end_lease()
            if self._taken >= MAX_LEASES:
                message = f"nodes were taken away {self._taken} times"
                raise LeaseLostError(message, hint="take on-demand nodes", code="too-many-leases")
            tell(_STAGE, "stage", name=f"{', '.join(lost.nodes)}: gone")
            release_nodes(self.request, self._nodes, False)
            provision_nodes(self.request, self._nodes, self._stop, self._book, lost)
            tell("tune", "leased", nodes=list(self._lease.nodes if self._lease else ()))
        else:
            provision_nodes(self.request, self._nodes, self._stop, self._book)
        assert self._lease is not None
        return self._lease

    def check_estimate(self, usd: float) -> None:
        """Raise if the training is expected to cost more than rented nodes may; one that goes on may have less to do.

        Raises:
            BudgetError: and by how much.
        """
        if self._budget is not None and self.request.offers and not self.cost.usd and usd > self._budget:
            raise self._too_dear(f"{usd:.2f} are expected")

    def check_budget(self) -> None:
        """Raise if the nodes have cost what they may.

        Raises:
            BudgetError: and how much it is.
        """
        if self._budget is not None and (self._is_spent or self._cost_now() > self._budget):
            raise self._too_dear(f"{self._cost_now():.2f} are spent")

    def _too_dear(self, told: str) -> BudgetError:
        return BudgetError(
            f"nodes may cost {self._budget:.2f} USD, and {told}",
            place=self.request.workspace,
            hint=f"a larger {MAX_COST}; a training goes on from its last checkpoint",
        )

    def is_lost(self) -> bool:
        """Whether nodes that the run had are gone."""
        return self._lease is not None and not self._nodes.alive(self._lease)

    def hand_over(self, service: Service) -> None:
        """Leave the nodes that the service runs on to it; what else the run has is given back."""
        self._nodes.hand_over(self.request.holder, service.nodes)
        self.give_back()

    def for_service(self) -> Tenancy:
        """The hold on the node that the service is for: this one, unless the training had several, or none here."""
        if self.request.count == 1 and not self._is_over:
            return self
        self.give_back()
        request = replace(self.request, count=1)
        return Tenancy(request, self._nodes, spent=self.cost, on_cost=self._on_cost, budget_usd=self._budget)

    def add_cost(self, cost: NodeCost) -> None:
        """Count what nodes in another cluster have cost."""
        self.cost += cost
        self._on_cost(self.cost)

    def give_back(self, *, keep: bool = False) -> None:
        """Give back what was leased, and what is being leased; once. The reaper takes what this cannot."""
        if self._is_over:
            return
        self._is_over = True
        self._stop.set()
        if self._future is not None:
            self._future.wait()
        self._end_lease()
        try:
            release_nodes(self.request, self._nodes, keep)
        except KaitoFlowsError as exc:
            log(f"the nodes could not be given back: {exc}; reap-nodes does it", warning=True)

    def _book(self, lease: NodeLease) -> None:
        """Count a lease from now on, and keep it; called as soon as it is there, whatever the run does meanwhile."""
        now = datetime.now(UTC)
        self._since, self._taken = time.monotonic(), self._taken + 1
        self._lease = replace(lease, ready_at=lease.ready_at or now, leased_at=lease.leased_at or now)
        if not lease.is_rented:
            return
        if self._keeper is None:
            run = contextvars.copy_context().run
            self._keeper = threading.Thread(target=run, args=(self._keep,), name="lease-keeper", daemon=True)
            self._keeper.start()
        try:
            self._warm_up(lease)
        except KaitoFlowsError as exc:
            log(f"the nodes are not warmed up: {exc}", warning=True)

    def _end_lease(self) -> None:
        """Count what the lease has cost."""
        if self._lease is None:
            return
        self.cost = self.cost.plus(self._paid(self._lease))
        self._lease = None
        self._on_cost(self.cost)

    def _paid(self, lease: NodeLease) -> PaidLease:
        # By the clock that gave the lease's times: this machine's may be another.
        begun = lease.leased_at or datetime.now(UTC)
        return PaidLease(lease, begun + timedelta(seconds=time.monotonic() - self._since))

    def _cost_now(self) -> float:
        """What all leases have cost by now, in USD."""
        lease = self._lease
        return (self.cost.plus(self._paid(lease)) if lease else self.cost).usd or 0.0

    def _keep(self) -> None:
        """Renew the lease whenever it is time, as long as the run lives; end its use when the budget is spent."""
        while not self._stop.wait(RENEW_SECONDS):
            lease = self._lease
            if lease is None:
                continue
            try:
                if self._budget is not None and self._cost_now() > self._budget:
                    self._spend_no_more()
                renewed = self._nodes.renew(lease, followed=_is_followed())
            except KaitoFlowsError as exc:
                log(f"the lease is not renewed: {exc}", warning=True)
                continue
            if self._lease is lease:  # not ended meanwhile
                self._lease = renewed

    def _spend_no_more(self) -> None:
        """Stop the job, which may save a checkpoint; without one there is nothing to wait for."""
        if not self._is_spent:
            log(f"nodes have cost the {self._budget:.2f} USD that they may", warning=True)
        self._is_spent = True
        if self._is_used:
            self._stop_job()
        else:
            self._nodes.release(self.request.holder)


@task(
    name="check-nodes",
    task_run_name="check-nodes-{request.workspace}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def check_nodes(request: NodeRequest, nodes: NodeProvider) -> None:
    """Raise if none of the sizes can be rented; of some that cannot, say why. Nothing is billed yet."""
    with stage("check nodes"):
        for offer, reason in nodes.check(request).items():
            sentence = f"{offer} cannot be had: {reason}"
            log(sentence, warning=True)
            tell("check nodes", "stage", name=sentence)


def node_request(
    workspace: Workspace, plan: Plan | ServingPlan | None, platform: Platform, settings: Settings
) -> NodeRequest:
    """What the run of a planned Workspace asks for. Without a plan, it brings a pod template of its own.

    Raises:
        PlanError: (codes of `offers`) its annotations ask for nodes that do not fit.
    """
    return NodeRequest.of(
        workspace,
        plan.gpus if plan else 0,
        namespace=platform.namespace,
        run_id=str(current_run.id or ""),
        offers=offers_of(workspace, plan, settings),
        disk_bytes=plan.disk_bytes if plan else 0,
    )


def _is_followed() -> bool:
    """Whether a Prefect server that outlives this process hears of its end, however it ends."""
    prefect = get_current_settings()
    return prefect.api.url is not None and prefect.flows.heartbeat_frequency is not None


def _told(what: str, facts: dict[str, Any]) -> None:
    """Tell of a try or a wait, as one line."""
    sentence = sentence_of(what, facts)
    log(sentence)
    tell(_STAGE, "stage", name=sentence)


def sentence_of(what: str, facts: dict[str, Any]) -> str:
    """What a provider tells as one line for people."""
    match what:
        case "trying":
            price = facts.get("price_usd_hour")
            return f"trying {facts['offer']}{f', {price:.2f} USD/h' if price else ''}"
        case "moving on":
            return f"{facts['offer']} cannot be had: {facts['code']}: {facts['reason']}"
        case "waiting for capacity":
            return "waiting for capacity: none of the sizes can be had now"
        case _:
            return f"{what}: {facts.get('reason', '')}"
