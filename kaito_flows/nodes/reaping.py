"""Which rented pools must go, and why: decided from what the cloud, Prefect and the cluster say; nothing is asked here.

    leased ── its run is over, or has not gone on for a term ► goes
      │  └── its lease has run out, and its run is not seen ─► goes; RUNNING, or Prefect silent: one more term before
    kept ──── its time has run out, its Workspace is gone ───► goes
    serving ─ its service is gone, or elsewhere ─────────────► then as a leased one

Times are the cloud's, and Prefect's of its runs: this machine's clock plays no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from kaito_flows.nodes.pools import Pool
from kaito_flows.workspace.status import duration

Action = Literal["keep", "remove", "going"]
Use = Literal["here", "elsewhere", "gone", "unknown"]

FRESH = timedelta(minutes=2)
"""A pool this young is left alone when Prefect does not know its run: it may be asked of another server."""

_OVER = {"COMPLETED": "has completed", "FAILED": "has failed", "CANCELLED": "was cancelled"}


@dataclass(frozen=True, slots=True)
class RunState:
    """The type of a flow run's state, as Prefect writes it (`RUNNING`), and since when it has it."""

    type: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What Prefect and the cluster say of those who hold pools.

    `runs` has the state of each run that Prefect knows, by id; None: Prefect does not answer.
    `uses` says by a serving pool's name where the Workspace's service is, `forgotten` names the kept pools whose
    Workspace is no longer there.
    """

    runs: Mapping[str, RunState] | None
    uses: Mapping[str, Use] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done about a pool, and why, in words. One that is `going` is on its way out already."""

    pool: Pool
    action: Action
    reason: str


def decide(pools: Sequence[Pool], known: Known, *, now: datetime, owner: str, term: timedelta) -> list[Verdict]:
    """Return a verdict for each pool of the installation `owner`; others' pools are not spoken of.

    `now` is the cloud's time, `term` how much longer than its lease a pool stays whose run may be at work.
    """
    return [_decide(pool, known, now, term) for pool in pools if pool.record.owner == owner]


def _decide(pool: Pool, known: Known, now: datetime, term: timedelta) -> Verdict:
    if pool.state == "deleting":
        return Verdict(pool, "going", "it is being deleted")
    match pool.record.state:
        case "kept":
            return _kept(pool, known, now)
        case "serving":
            return _serving(pool, known, now, term)
        case _:
            return _leased(pool, known, now, term)


def _leased(pool: Pool, known: Known, now: datetime, term: timedelta) -> Verdict:
    record = pool.record
    if record.state == "leased" and known.uses.get(pool.name) == "here":
        return Verdict(pool, "keep", "its Workspace's service runs there")
    run = (known.runs or {}).get(record.holder.run_id)
    # A run that Prefect does not know has no state: it was started elsewhere, or has been removed there.
    state = None if known.runs is None else run.type if run else ""
    if state in _OVER:
        failed = f"; the pool failed: {pool.reason or pool.code}" if pool.state == "failed" else ""
        return Verdict(pool, "remove", f"its run {_OVER[state]}{failed}")
    said = _of_run(state)
    # Its lease may be a long one, but who does not go on has no use for nodes.
    if run is not None and state != "RUNNING" and (idle := now - run.since) >= term:
        return Verdict(pool, "remove", f"{said}: it has not gone on for {duration(idle.total_seconds())}")
    late = now - record.expires_at
    if late < timedelta(0):
        return Verdict(pool, "keep", f"leased for {duration(-late.total_seconds())} more; {said}")
    since = f"its lease ran out {duration(late.total_seconds())} ago; {said}"
    if state == "" and now - record.created_at < FRESH:
        return Verdict(pool, "keep", f"{since}, but it was made a moment ago")
    # Renewals can fail while a run works, and Prefect can be away while all runs do.
    if (state is None or state == "RUNNING") and late < term:
        return Verdict(pool, "keep", f"{since}, so it has one more term")
    return Verdict(pool, "remove", since)


def _of_run(state: str | None) -> str:
    match state:
        case None:
            return "Prefect does not answer"
        case "":
            return "Prefect does not know its run"
        case "CRASHED":
            return "its run has crashed, and may be resumed"
        case _:
            return f"its run is {state.lower()}"


def _kept(pool: Pool, known: Known, now: datetime) -> Verdict:
    late = now - pool.record.expires_at
    if late >= timedelta(0):
        return Verdict(pool, "remove", f"it was kept for the next run, until {duration(late.total_seconds())} ago")
    if pool.name in known.forgotten:
        return Verdict(pool, "remove", "it was kept for the next run, and its Workspace is gone")
    if pool.state == "failed":
        return Verdict(pool, "remove", f"it was kept for the next run, and failed: {pool.reason or pool.code}")
    return Verdict(pool, "keep", f"kept for the next run, for {duration(-late.total_seconds())} more")


def _serving(pool: Pool, known: Known, now: datetime, term: timedelta) -> Verdict:
    use = known.uses.get(pool.name, "unknown")
    if use == "here":
        return Verdict(pool, "keep", "its service is there")
    if use == "unknown":
        return Verdict(pool, "keep", "whether its service is there cannot be told")
    # The run that has left it to the service may be at work still.
    verdict = _leased(pool, known, now, term)
    said = "its service is gone" if use == "gone" else "its service is on other nodes"
    return Verdict(pool, verdict.action, f"{said}; {verdict.reason}")
