"""Remove the rented nodes that nobody answers for: look, ask who holds them, decide, remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from prefect import task
from prefect.cache_policies import NO_CACHE

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import CloudError, KaitoFlowsError, LeaseLostError
from kaito_flows.nodes.listing import columns
from kaito_flows.nodes.pools import Pool
from kaito_flows.nodes.reaping import Known, Verdict, decide
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.nodes.uses import forgotten, uses_of
from kaito_flows.settings import Settings
from kaito_flows.tasks.progress import log
from kaito_flows.tasks.retries import RETRY_DELAYS, is_retryable
from kaito_flows.tasks.runs import run_states

KEPT, GOING, WOULD_GO = "kept", "going", "would be removed"
REMOVED, IN_USE_AGAIN, NOT_REMOVED = "removed", "in use again", "not removed"

Remove = Callable[[Pool, RentedNodes], str]


@dataclass(frozen=True, slots=True)
class Reaped:
    """A pool, what was decided, and what came of it; `seen_at` is the cloud's time."""

    verdict: Verdict
    seen_at: datetime
    outcome: str
    error: KaitoFlowsError | None = None

    @property
    def reason(self) -> str:
        """Why, and what went wrong."""
        return f"{self.verdict.reason}; {self.error}" if self.error else self.verdict.reason

    @property
    def row(self) -> dict[str, str]:
        """For the report."""
        return {**columns(self.verdict.pool, self.seen_at), "OUTCOME": self.outcome, "REASON": self.reason}

    @property
    def line(self) -> str:
        """For the log."""
        pool, holder = self.verdict.pool, self.verdict.pool.record.holder
        return f"{pool.name} of {holder.namespace}/{holder.workspace}: {self.outcome}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """What the reaper came to: each pool, and the clouds that could not be asked, by kind."""

    reaped: tuple[Reaped, ...] = ()
    unasked: tuple[tuple[str, KaitoFlowsError], ...] = ()

    def raise_if_incomplete(self) -> None:
        """Raise if a pool that had to go is still there, or a cloud was not asked.

        Raises:
            CloudError: (code `not-reaped`) the first cause of each, on one line.
        """
        left = [f"{r.verdict.pool.name}: {r.error}" for r in self.reaped if r.outcome == NOT_REMOVED]
        faults = [*left, *(f"{kind}: {exc}" for kind, exc in self.unasked)]
        if faults:
            raise CloudError(
                "; ".join(faults),
                place=f"{len(left)} of {len(self.reaped)} pools not removed" if left else "pools not listed",
                hint="it is tried again at the next run",
                code="not-reaped",
            )


@task(
    name="remove-pool",
    task_run_name="remove-{pool.name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def remove_pool(pool: Pool, provider: RentedNodes) -> str:
    """Ask the cloud to remove the pool, if it is still as it was when it was listed; say what came of it."""
    try:
        provider.cloud.delete(pool)
    except LeaseLostError:
        return IN_USE_AGAIN
    return REMOVED


def reap(
    rented: Sequence[RentedNodes],
    cluster: Cluster,
    settings: Settings,
    *,
    dry_run: bool = False,
    remove: Remove = remove_pool,
) -> Report:
    """Remove what must go of these providers' pools; one that cannot be removed, or asked, keeps no other from it."""
    seen, unasked = [], []
    for provider in rented:
        try:
            seen.append((provider, provider.pools(), provider.cloud.now()))
        except KaitoFlowsError as exc:
            log(f"{provider.cloud.kind}: {exc}", warning=True)
            unasked.append((provider.cloud.kind, exc))
    # Asked after the pools: a run that has a pool is known by then.
    runs = run_states(pool.record.holder.run_id for _, pools, _ in seen for pool in pools)
    reaped = []
    for provider, pools, now in seen:
        known = Known(runs, uses_of(pools, provider.cloud, cluster), forgotten(pools, cluster))
        term = timedelta(minutes=settings.lease_minutes)
        for verdict in decide(pools, known, now=now, owner=settings.owner, term=term):
            found = _done(verdict, provider, now, None if dry_run else remove)
            log(found.line, warning=found.outcome == NOT_REMOVED)
            reaped.append(found)
    return Report(tuple(reaped), tuple(unasked))


def _done(verdict: Verdict, provider: RentedNodes, now: datetime, remove: Remove | None) -> Reaped:
    if verdict.action != "remove":
        return Reaped(verdict, now, KEPT if verdict.action == "keep" else GOING)
    if remove is None:
        return Reaped(verdict, now, WOULD_GO)
    try:
        return Reaped(verdict, now, remove(verdict.pool, provider))
    except KaitoFlowsError as exc:
        return Reaped(verdict, now, NOT_REMOVED, exc)
