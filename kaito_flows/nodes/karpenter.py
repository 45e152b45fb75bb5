"""Karpenter as a cloud: a pool of nodes is as many NodeClaims, which only we write and only Karpenter serves.

The first claim of a pool is the one that decides: its record is the pool's, and whoever changes or removes it as it was
when looked at has won against everyone else. The others follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.refusals import ConflictError, MissingError
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import AccessError, CloudError, ClusterError, InputError, KaitoFlowsError, LeaseLostError
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.claim_states import ClaimState, failure_in, given_up, state_of
from kaito_flows.nodes.claims import MACHINE, NODE_CLAIM, Claim, claim_names, manifest
from kaito_flows.nodes.node_classes import NodeClass, find_node_class, zone_label
from kaito_flows.nodes.pools import POOL_LABEL, LeaseRecord, Pool
from kaito_flows.settings import Settings

# Events about what belongs to no namespace are there.
_EVENTS_NAMESPACE = "default"
_REMOVED = "node-removed"


@contextmanager
def _as_cloud_errors() -> Iterator[None]:
    try:
        yield
    except (ConflictError, MissingError):
        raise
    except ClusterError as exc:
        raise CloudError(exc.message, place=exc.place, hint=exc.hint) from exc


class NodeClaims:
    """The cloud whose pools are NodeClaims, or Machines where Karpenter is that old. Making it asks nobody anything.

    Besides what `Cloud` says, every call raises `InputError`: `karpenter-not-installed`, and what `find_node_class`
    names.
    """

    kind = "karpenter"
    throttles = False
    look_seconds = 5.0

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        # Of a claim that Karpenter has removed nothing is left but what was seen of it, and its Events.
        self._seen: dict[str, list[Claim]] = {}

    @_as_cloud_errors()
    def now(self) -> datetime:
        """The API server's time."""
        return self._cluster.server_time()

    @_as_cloud_errors()
    def against(self, offers: Sequence[Offer], count: int) -> Mapping[Offer, str]:
        """What gpu-provisioner cannot do. Of sizes and quota Karpenter tells nothing before it is asked for a node."""
        if not self._node_class.is_gpu_provisioner:
            return {}
        found = {}
        for offer in offers:
            if offer.spot:
                found[offer] = "gpu-provisioner makes no spot nodes"
            elif offer.zone:
                found[offer] = "gpu-provisioner does not let the zone be chosen"
        return found

    @_as_cloud_errors()
    def pools(self) -> list[Pool]:
        """As `Cloud.pools`."""
        grouped: dict[str, list[Claim]] = {}
        for found in self._cluster.list(self._kind, labels=POOL_LABEL):
            if claim := Claim.of(found):
                grouped.setdefault(claim.pool, []).append(claim)
        return [_pool(_in_order(claims)) for claims in grouped.values()]

    @_as_cloud_errors()
    def create(self, name: str, offer: Offer, request: NodeRequest, record: LeaseRecord) -> Pool:
        """As `Cloud.create`; claims that a pool of ours lacks are added.

        Raises:
            CloudError: (code `cloud-busy`) an older claim of that name is on its way out.
        """
        zone = zone_label(self._cluster, self._node_class, offer.zone)
        claims: list[Claim] = []
        made: list[Claim] = []
        try:
            for claim_name in claim_names(name, request.count):
                wanted = manifest(self._kind, claim_name, name, offer, request, record, self._node_class, zone)
                claim, is_new = self._ensure(wanted)
                claims.append(claim)
                made += [claim] if is_new else []
                if claim.record.holder != record.holder:
                    break
        except KaitoFlowsError:
            for claim in made:
                self._remove(claim, None)
            raise
        self._seen[name] = claims
        pool = self.look(name)
        if pool is None:
            raise CloudError("it was removed at once", place=self._place(name), code="cloud-busy")
        return pool

    @_as_cloud_errors()
    def look(self, name: str) -> Pool | None:
        """As `Cloud.look`: of claims that Karpenter has given up it is told why."""
        claims = self._claims(name)
        alive = {claim.uid for claim in claims if not claim.is_leaving}
        known = {claim.uid for claim in self._seen.get(name, [])} | alive
        latest = {claim.uid: claim for claim in (*self._seen.get(name, []), *claims) if claim.uid in known}
        self._seen[name] = _in_order(list(latest.values()))
        gone = [claim for claim in self._seen[name] if claim.uid not in alive]
        if failure := self._why_gone(gone):
            return _pool(claims or gone, failure)
        return _pool(claims) if claims else None

    @_as_cloud_errors()
    def mark(self, pool: Pool, record: LeaseRecord) -> Pool:
        """As `Cloud.mark`: the first claim decides."""
        claims = self._claims(pool.name)
        for number, claim in enumerate(claims):
            self._write(claim, record, pool.record if number == 0 else None)
        marked = self.look(pool.name) if claims else None
        if marked is None:
            raise self._lost(pool.name)
        return marked

    @_as_cloud_errors()
    def delete(self, pool: Pool) -> None:
        """As `Cloud.delete`: the first claim decides. Nodes go with their claims."""
        self._seen.pop(pool.name, None)
        for number, claim in enumerate(self._claims(pool.name)):
            self._remove(claim, pool.record if number == 0 else None)

    def node_labels(self, name: str) -> Mapping[str, str]:
        """As `Cloud.node_labels`: Karpenter hands a claim's labels to its node."""
        return {POOL_LABEL: name}

    # --- claims -------------------------------------------------------------------------------------------------------

    def _claims(self, pool: str) -> list[Claim]:
        """The claims of a pool that carry a record, the one that decides first."""
        found = self._cluster.list(self._kind, labels={POOL_LABEL: pool})
        return _in_order([claim for item in found if (claim := Claim.of(item))])

    def _ensure(self, wanted: Object) -> tuple[Claim, bool]:
        """Create a claim, or adopt the one of that name; say whether it is new."""
        name, pool = wanted["metadata"]["name"], wanted["metadata"]["labels"][POOL_LABEL]
        try:
            found: Object | None = self._cluster.create(wanted)
            is_new = True
        except ConflictError as exc:
            found, is_new = self._cluster.get(self._kind, name), False
            if found is None or "deletionTimestamp" in found["metadata"]:
                message = "an older claim of that name is still being removed"
                raise CloudError(message, place=self._place(name), code="cloud-busy") from exc
        claim = Claim.of(found)
        if claim is None or claim.pool != pool:
            raise InputError(
                "there is a claim of that name that kaito-flows did not make",
                place=self._place(name),
                hint="delete it, if it is nobody's",
                code="pool-taken",
            )
        return claim, is_new

    def _write(self, claim: Claim, record: LeaseRecord, before: LeaseRecord | None) -> None:
        """Write a record on a claim, if it carries the one `before` (None: any)."""
        current: Claim | None = claim
        while True:
            if current is None or current.is_leaving or not _carries(current, before):
                raise self._lost(claim.name)
            changes = {"metadata": {"resourceVersion": current.version, "annotations": record.as_tags()}}
            try:
                if self._cluster.patch(self._kind, claim.name, changes) is None:
                    raise self._lost(claim.name)
                return
            except ConflictError:  # Karpenter writes there, too
                current = Claim.of(self._cluster.get(self._kind, claim.name))

    def _remove(self, claim: Claim, before: LeaseRecord | None) -> None:
        """Delete a claim, if it carries the record `before` (None: any)."""
        uid = claim.uid
        current: Claim | None = claim
        while current is not None and not current.is_leaving:
            if not _carries(current, before):
                raise self._lost(claim.name)
            try:
                self._cluster.delete(self._kind, claim.name, uid=uid, resource_version=current.version)
                return
            except ConflictError:
                current = Claim.of(self._cluster.get(self._kind, claim.name))
                if current is not None and current.uid != uid:
                    return

    def _why_gone(self, claims: Sequence[Claim]) -> ClaimState | None:
        """Why Karpenter has removed claims, if it was Karpenter, by their Events and their last conditions."""
        unread: ClaimState | None = None
        now = self._cluster.server_time() if claims else None
        for claim in claims:
            try:
                found = failure_in(self._cluster.within(_EVENTS_NAMESPACE).events(claim.object))
            except AccessError as exc:
                found = None
                unread = ClaimState("failed", f"it is gone, and its Events cannot be read: {exc.message}", _REMOVED)
            if found := found or (given_up(claim.object, now) if now else None):
                return found
        return unread

    def _place(self, name: str) -> str:
        return f"{self._kind.rpartition('/')[2]} {name}"

    def _lost(self, name: str) -> LeaseLostError:
        message = "somebody has changed or removed it since it was looked at"
        return LeaseLostError(message, place=self._place(name))

    # --- what is installed --------------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> str:
        for kind in (NODE_CLAIM, MACHINE):
            version, _, short = kind.rpartition("/")
            if version in self._cluster.served(short):
                return kind
        raise InputError(
            "the cluster knows no NodeClaims of karpenter.sh/v1, and no Machines of karpenter.sh/v1alpha5",
            place="KAITO_FLOWS_NODES",
            hint="install Karpenter or gpu-provisioner (docs/karpenter.md), or take other nodes: existing, aks",
            code="karpenter-not-installed",
        )

    @cached_property
    def _node_class(self) -> NodeClass:
        if self._kind == MACHINE:  # gpu-provisioner's: Machines have no node class
            return NodeClass("KaitoNodeClass", "default")
        return find_node_class(self._cluster, self._settings.karpenter_node_class)


def _in_order(claims: list[Claim]) -> list[Claim]:
    """A pool's claims, the one that decides first."""
    names = claim_names(claims[0].pool, max(claim.count for claim in claims)) if claims else ()
    order = {name: number for number, name in enumerate(names)}
    return sorted(claims, key=lambda claim: order.get(claim.name, len(order)))


def _pool(claims: Sequence[Claim], failure: ClaimState | None = None) -> Pool:
    first = claims[0]
    state = failure or _together([state_of(claim.object) for claim in claims], first.count)
    return Pool(
        name=first.pool,
        offer=first.offer,
        count=first.count,
        state=state.state,
        record=first.record,
        reason=state.reason,
        code=state.code,
        version=",".join(claim.version for claim in claims),
    )


def _together(states: Sequence[ClaimState], count: int) -> ClaimState:
    """Where a pool is: as far as its slowest claim, and failed with the first that fails."""
    going = [state for state in states if state.state == "deleting"]
    if len(going) == len(states):
        return going[0]
    failed = next((state for state in states if state.state == "failed"), None)
    if failed:
        return failed
    if going or len(states) < count:
        # What is left of it must go, too: half a pool is none.
        left = len(states) - len(going)
        return ClaimState("failed", f"{count - left} of its {count} claims are gone", _REMOVED)
    return next((state for state in states if state.state == "creating"), ClaimState("ready"))


def _carries(claim: Claim, record: LeaseRecord | None) -> bool:
    # As it is written: to the second.
    return record is None or claim.record.as_tags() == record.as_tags()
