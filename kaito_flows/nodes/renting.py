"""Renting: one way through for every cloud, from the first offer to nodes that are given back.

    offers ─► check ─► create ─► wait until ready ─► lease ─► renew … ─► release
                 └──────────┴───────────┴─ not this one: remove what is left of it, and try the next

A pool belongs to one run and carries its record (`pools.py`), so that a run that comes again finds its own, and the
reaper finds those whose run does not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from threading import Event

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import CapacityError, CloudError, LeaseLostError, SchedulingError
from kaito_flows.nodes.base import Holder, NodeLease, NodeRequest, Offer, Tell
from kaito_flows.nodes.pools import Cloud, LeaseRecord, Pool, pool_name, shape_of
from kaito_flows.nodes.readiness import is_ready, name_of, ready_since, waits_for
from kaito_flows.nodes.uses import is_served_by
from kaito_flows.settings import Settings

# Between two looks at the cluster's nodes, and at a cloud that is busy with something else.
_NODE_SECONDS = 3.0
_BUSY_SECONDS = 20.0
_CAPACITY_SECONDS = 60.0
# What a renewal adds where the cloud throttles: so many times as long as the nodes have been had, and a day at most.
_GROWTH = 5
_LONGEST_TERM = timedelta(days=1)
# For what no waiting helps.
_HOPELESS = ("size-not-offered", "size-not-allowed")


class RentedNodes:
    """The provider of nodes that are rented from a cloud for one run."""

    def __init__(self, cloud: Cloud, cluster: Cluster, settings: Settings) -> None:
        self.cloud = cloud
        self._cluster = cluster
        self._settings = settings
        self._checked: dict[Offer, str] | None = None
        self._listed: tuple[float, list[Pool]] | None = None
        self._left: set[str] = set()

    # --- before anything is made --------------------------------------------------------------------------------------

    def check(self, request: NodeRequest) -> Mapping[str, str]:
        """As `NodeProvider.check`. Quota that pools of ours use up may be free in time: `lease` waits for it."""
        if not request.offers:
            return {}
        known = self._pools()
        against = self._against(request, known)
        ours = any(pool.record.owner == self._settings.owner for pool in known)
        if len(against) == len(request.offers) and not ours:
            raise _none_left(
                {str(offer): reason for offer, reason in against.items()}, "none of the sizes can be rented"
            )
        return {str(offer): reason for offer, reason in against.items()}

    def _against(self, request: NodeRequest, known: list[Pool]) -> dict[Offer, str]:
        """What speaks against offers; nothing against one of which there is a pool for this run already."""
        if self._checked is None:
            self._checked = dict(self.cloud.against(request.offers, request.count))
        return {
            offer: self._checked[offer]
            for offer in request.offers
            if offer in self._checked and not any(self._is_for(pool, offer, request) for pool in known)
        }

    def _pools(self, *, seconds: float = 30.0) -> list[Pool]:
        """All pools, as they were seen within so many seconds."""
        if self._listed is None or time.monotonic() - self._listed[0] > seconds:
            self._listed = time.monotonic(), self.cloud.pools()
        return self._listed[1]

    # --- lease --------------------------------------------------------------------------------------------------------

    def lease(self, request: NodeRequest, tell: Tell, stop: Event | None = None) -> NodeLease:
        """As `NodeProvider.lease`: the first offer that can be had.

        Raises:
            SchedulingError: (code `no-node`) none could be had in time, with what spoke against each.
            SchedulingError: (code `lease-abandoned`) `stop` was set.
            CloudError: the cloud does not answer.
            AccessError: it says no.
        """
        stop = stop or Event()
        if not request.offers:
            raise SchedulingError(
                "there is no size to rent",
                place="resource.instanceType",
                hint="name one there, or a larger KAITO_FLOWS_MAX_PRICE_USD_HOUR",
                code="no-node",
            )
        started = time.monotonic()
        reasons: dict[str, str] = {}
        hopeless: set[Offer] = set()
        while True:
            known = self._pools()
            against = self._against(request, known)
            reasons |= {str(offer): reason for offer, reason in against.items()}
            for offer in request.offers:
                if offer in hopeless or offer in against:
                    continue
                tell("trying", {"offer": str(offer), "price_usd_hour": offer.price_usd_hour})
                try:
                    return self._take(offer, request, known, tell, stop)
                except CapacityError as exc:
                    reasons[str(offer)] = f"{exc.code}: {exc.message}"
                    tell("moving on", {"offer": str(offer), "code": exc.code, "reason": exc.message})
                    if exc.code in _HOPELESS:
                        hopeless.add(offer)
            waited = time.monotonic() - started
            if waited > self._settings.capacity_seconds or len(hopeless) == len(request.offers):
                raise _none_left(reasons, "no node could be rented")
            tell("waiting for capacity", {"reasons": reasons})
            _pause(_CAPACITY_SECONDS, stop)
            self._checked = self._listed = None  # quota may be free by now

    def _take(self, offer: Offer, request: NodeRequest, known: list[Pool], tell: Tell, stop: Event) -> NodeLease:
        """Take one offer: the pool that this run has of it, else one that was kept, else a new one."""
        pool = self._own(offer, request, known) or self._kept(offer, request, known)
        pool = pool or self._made(offer, request, known, tell, stop)
        self._listed = None
        try:
            nodes = self._await_ready(pool, offer, request, tell, stop)
        except CapacityError:
            self._clear(pool.name, tell)
            raise
        return self._lease_of(pool, offer, request.workspace, nodes)

    def _is_for(self, pool: Pool, offer: Offer, request: NodeRequest) -> bool:
        """Whether the run has that pool, or may have it."""
        return self._is_own(pool, offer, request) or self._is_kept(pool, offer, request)

    def _is_own(self, pool: Pool, offer: Offer, request: NodeRequest) -> bool:
        record = pool.record
        mine = record.owner == self._settings.owner and record.holder == request.holder and record.state == "leased"
        return mine and _is_offer(pool, offer) and pool.count == request.count and pool.state in ("creating", "ready")

    def _is_kept(self, pool: Pool, offer: Offer, request: NodeRequest) -> bool:
        record = pool.record
        ours = record.owner == self._settings.owner and _same_workspace(record.holder, request.holder)
        fits = _is_offer(pool, offer) and pool.count == request.count and record.shape == shape_of(request)
        return ours and fits and record.state == "kept" and pool.state == "ready"

    def _own(self, offer: Offer, request: NodeRequest, known: list[Pool]) -> Pool | None:
        """The pool that this run had asked for, or had taken over, before it came again."""
        return next((pool for pool in known if self._is_own(pool, offer, request)), None)

    def _kept(self, offer: Offer, request: NodeRequest, known: list[Pool]) -> Pool | None:
        """A pool that an earlier run of the Workspace has left for this one."""
        for pool in known:
            if self._is_kept(pool, offer, request):
                expires = self.cloud.now() + self._term
                # What it has cost since it was kept is this run's to pay.
                taken = replace(pool.record, holder=request.holder, state="leased", expires_at=expires)
                try:
                    return self.cloud.mark(pool, taken)
                except LeaseLostError:
                    continue  # the reaper, or another run, was faster
        return None

    def _made(self, offer: Offer, request: NodeRequest, known: list[Pool], tell: Tell, stop: Event) -> Pool:
        """A new pool. A name under which one has failed, or is on its way out, is not used again."""
        attempt = 0
        spent = {pool.name: pool for pool in known}
        while (name := pool_name(self._settings.owner, request.holder, offer, attempt)) in spent:
            found = spent[name]
            if found.state == "failed" and found.record.holder == request.holder:
                self._clear(name, tell)
            attempt += 1
        now = self.cloud.now()
        # The first renewal comes when the nodes are ready.
        term = max(self._term, timedelta(seconds=self._settings.node_ready_seconds) + self._term / 2)
        record = LeaseRecord(self._settings.owner, request.holder, "leased", now, now + term, shape_of(request))
        deadline = time.monotonic() + self._settings.node_ready_seconds
        while True:
            try:
                pool = self.cloud.create(name, offer, request, record)
            except CapacityError:
                self._clear(name, tell)
                raise
            except CloudError as exc:
                if exc.code != "cloud-busy" or time.monotonic() > deadline:
                    raise
                tell("waiting for the cloud", {"offer": str(offer), "reason": exc.message})
                _pause(_BUSY_SECONDS, stop)
                continue
            if pool.record.holder != request.holder:
                raise CapacityError(f"the pool {name} is another run's: {pool.record.holder.run_id}", place=name)
            return pool

    def _await_ready(self, pool: Pool, offer: Offer, request: NodeRequest, tell: Tell, stop: Event) -> list[Object]:
        """Wait until the pool's nodes can take a job; return them.

        The cluster is asked often, which costs nothing; a cloud that throttles ever more rarely.
        """
        started = time.monotonic()
        looked_at, told = started, ""
        look_seconds = self.cloud.look_seconds
        labels = self.cloud.node_labels(pool.name)
        while True:
            nodes = self._cluster.list("Node", labels=labels)
            waits = waits_for(nodes, request.count, offer.instance_type, offer.gpus if request.gpus else 0)
            if not waits:
                return nodes
            if time.monotonic() - looked_at >= look_seconds:
                looked_at = time.monotonic()
                look_seconds *= 2 if self.cloud.throttles else 1
                pool = self._still(pool, self.cloud.look(pool.name))
            reason = waits if nodes or not pool.reason else f"{waits}: {pool.reason}"
            if reason != told:
                told = reason
                tell("waiting for the node", {"pool": pool.name, "reason": reason})
            if time.monotonic() - started > self._settings.node_ready_seconds:
                minutes = self._settings.node_ready_seconds / 60
                raise CapacityError(
                    f"not ready after {minutes:.0f} min: {reason}", place=pool.name, code="node-not-ready"
                )
            _pause(_NODE_SECONDS, stop)

    def _still(self, before: Pool, pool: Pool | None) -> Pool:
        if pool is None or pool.state == "deleting":
            raise CapacityError("somebody has removed the pool", place=before.name, code="node-removed")
        if pool.state == "failed":
            raise CapacityError(pool.reason or "the pool has failed", place=pool.name, code=pool.code)
        if pool.record.holder != before.record.holder:
            raise CapacityError("somebody else has taken the pool", place=before.name, code="node-removed")
        return pool

    # --- while it is held ---------------------------------------------------------------------------------------------

    def renew(self, lease: NodeLease, *, followed: bool = False) -> NodeLease:
        """As `NodeProvider.renew`."""
        for name in tuple(self._left):
            self._clear(name, lambda *_: None)
        now = self.cloud.now()
        if lease.expires_at is None or lease.expires_at - now > self._term / 4:
            return lease
        pool = self.cloud.look(lease.name)
        if pool is None or pool.state == "deleting":
            raise LeaseLostError("the pool is gone", place=lease.name)
        record = pool.record
        if (record.owner, record.holder.run_id, record.state) != (self._settings.owner, lease.run_id, "leased"):
            raise LeaseLostError("the pool is no longer this run's", place=lease.name)
        expires = now + (self._next_term(now - record.created_at) if followed else self._term)
        self.cloud.mark(pool, replace(record, expires_at=expires))
        return replace(lease, expires_at=expires)

    def alive(self, lease: NodeLease) -> bool:
        """Whether all of the nodes are there and ready."""
        ready = {name_of(node) for node in self._cluster.list("Node") if is_ready(node)}
        return ready.issuperset(lease.nodes)

    # --- giving back --------------------------------------------------------------------------------------------------

    def release(self, holder: Holder, *, keep: bool = False) -> None:
        """As `NodeProvider.release`. Of a run's nodes, those that the Workspace's service runs on are left to it."""
        for pool in self._of(holder):
            record = pool.record
            if pool.state == "deleting" or (holder.run_id and record.state != "leased"):
                continue
            grace = self._settings.grace_seconds
            if holder.run_id and is_served_by(pool, self.cloud, self._cluster):
                self.cloud.mark(pool, replace(record, state="serving"))
            elif keep and grace and pool.state == "ready":
                now = self.cloud.now()
                kept = replace(record, state="kept", created_at=now, expires_at=now + timedelta(seconds=grace))
                self.cloud.mark(pool, kept)
            else:
                self.cloud.delete(pool)

    def hand_over(self, holder: Holder, nodes: Sequence[str]) -> None:
        """As `NodeProvider.hand_over`."""
        old = []
        for pool in self._of(replace(holder, run_id="")):
            found = self._cluster.list("Node", labels=self.cloud.node_labels(pool.name))
            names = {name for node in found for name in (node["metadata"]["name"], name_of(node))}
            serves = not names.isdisjoint(nodes)
            if serves and pool.record.state != "serving":
                self.cloud.mark(pool, replace(pool.record, state="serving"))
            elif not serves and pool.record.state == "serving" and pool.state != "deleting":
                old.append(pool)
        for pool in old:
            # The service is up, and that is what counts: the reaper sees that it has left these nodes.
            with contextlib.suppress(CloudError, LeaseLostError):
                self.cloud.delete(pool)

    def pools(self) -> list[Pool]:
        """All pools of this installation, oldest first."""
        found = [pool for pool in self.cloud.pools() if pool.record.owner == self._settings.owner]
        return sorted(found, key=lambda pool: (pool.record.created_at, pool.name))

    def _of(self, holder: Holder) -> list[Pool]:
        return [
            pool
            for pool in self.pools()
            if _same_workspace(pool.record.holder, holder) and holder.run_id in ("", pool.record.holder.run_id)
        ]

    def _clear(self, name: str, tell: Tell) -> None:
        """Remove what a try has left. If that cannot be done now, the next try is not kept waiting: `renew` does it."""
        try:
            pool = self.cloud.look(name)
            if pool is not None and pool.state != "deleting":
                self.cloud.delete(pool)
            self._left.discard(name)
        except (CloudError, LeaseLostError) as exc:
            self._left.add(name)
            tell("left behind for now", {"pool": name, "reason": exc.message})

    def _lease_of(self, pool: Pool, offer: Offer, workspace: str, nodes: list[Object]) -> NodeLease:
        now, since = self.cloud.now(), ready_since(nodes)
        return NodeLease(
            provider=self.cloud.kind,
            workspace=workspace,
            nodes=tuple(sorted(map(name_of, nodes))),
            instance_type=offer.instance_type,
            price_usd_hour=offer.price_usd_hour,
            name=pool.name,
            run_id=pool.record.holder.run_id,
            gpus=offer.gpus,
            spot=offer.spot,
            zone=offer.zone,
            created_at=pool.record.created_at,
            # A run that comes again finds nodes that have been ready for long.
            ready_at=min(max(since, pool.record.created_at), now) if since else now,
            leased_at=now,
            expires_at=pool.record.expires_at,
        )

    @property
    def _term(self) -> timedelta:
        return timedelta(minutes=self._settings.lease_minutes)

    def _next_term(self, held: timedelta) -> timedelta:
        """How long the lease lasts from a renewal on, of nodes that were asked for so long ago.

        A lease of a day is renewed twice. It may then last long after its run, and decides only where Prefect is gone:
        of a run that is over, or does not go on, the reaper removes the nodes however long their lease is.
        """
        return max(self._term, min(_GROWTH * held, _LONGEST_TERM)) if self.cloud.throttles else self._term


def _pause(seconds: float, stop: Event) -> None:
    if stop.wait(seconds):
        raise SchedulingError("the run no longer wants it", code="lease-abandoned")


def _is_offer(pool: Pool, offer: Offer) -> bool:
    """Whether the pool is what is offered; a pool says which zone it came to lie in, where any would have done."""
    same = pool.offer.instance_type.lower() == offer.instance_type.lower() and pool.offer.spot == offer.spot
    return same and offer.zone in ("", pool.offer.zone)


def _same_workspace(one: Holder, other: Holder) -> bool:
    return (one.namespace, one.workspace) == (other.namespace, other.workspace)


def _none_left(reasons: Mapping[str, str], what: str) -> SchedulingError:
    told = "; ".join(f"{offer}: {reason}" for offer, reason in reasons.items())
    return SchedulingError(
        f"{what}: {told}",
        place="resource.instanceType",
        hint="more quota, more sizes (annotation kaito-flows/instance-types), or a longer KAITO_FLOWS_CAPACITY_SECONDS",
        code="no-node",
    )
