"""Nodes from AKS: an agent pool for each lease, in the cluster that the flows run in.

    create: PUT, only if there is none ─► look: GET ─► mark: PUT of the tags, if unchanged ─► delete

An ETag changes when an operation begins, and again when it ends: what AKS answers to a PUT cannot be written to later,
and each mark takes a GET before it. No long-running operation is waited for: the agent pool says itself how far it is,
and to a run that comes again just as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

from azure.mgmt.containerservice.models import AgentPool

from kaito_flows.errors import CloudError, InputError, LeaseLostError
from kaito_flows.nodes.azure.agent_pools import Network, failure_code, marked, network_of, new_pool, pool_of
from kaito_flows.nodes.azure.arm import Arm
from kaito_flows.nodes.azure.errors import BUSY, shortened
from kaito_flows.nodes.azure.quota import against
from kaito_flows.nodes.base import NodeRequest, Offer
from kaito_flows.nodes.pools import POOL_LABEL, LeaseRecord, Pool
from kaito_flows.settings import Settings

_TRIES: Final = 4
_BUSY_SECONDS: Final = 10.0
_NO_REASON: Final = "AKS gives no reason: the cluster's activity log in the portal may have one"


class AksPools:
    """The agent pools of one AKS cluster, as `kaito_flows.nodes.pools.Cloud` has them."""

    kind = "aks"
    throttles = True
    look_seconds = 120.0

    def __init__(self, arm: Arm, spot_max_price: float = -1.0) -> None:
        self._arm = arm
        self._spot_max_price = spot_max_price
        # As they were read last: what is written back is all of a pool, and reading it again would be one more call.
        self._read: dict[str, AgentPool] = {}
        self._network: Network | None = None

    @classmethod
    def connect(cls, settings: Settings) -> AksPools:
        """Open Azure by the settings, as whom the surroundings say (`DefaultAzureCredential`).

        Raises:
            InputError: (code `no-cloud`) the settings do not say which cluster.
        """
        return cls(Arm.connect(settings), settings.aks_spot_max_price)

    def now(self) -> datetime:
        """As `Cloud.now`: by the last answer's `Date`."""
        return self._arm.now()

    def against(self, offers: Sequence[Offer], count: int) -> Mapping[Offer, str]:
        """As `Cloud.against`: region, restrictions, zone, and what is left of each quota."""
        return against(self._arm, offers, count)

    def node_labels(self, name: str) -> Mapping[str, str]:
        """As `Cloud.node_labels`."""
        return {POOL_LABEL: name}

    def pools(self) -> list[Pool]:
        """As `Cloud.pools`."""
        listed = self._arm.list()
        self._network = network_of(listed)
        return [pool for found in listed if (pool := self._kept(found)) is not None]

    def look(self, name: str) -> Pool | None:
        """As `Cloud.look`; one that has no record is nobody's here, and not told of."""
        found = self._arm.get(name)
        pool = self._kept(found) if found is not None else None
        if pool is None or pool.state != "failed" or pool.reason:
            return pool
        reason = self._arm.failure(name)
        return replace(pool, reason=shortened(reason) or _NO_REASON, code=failure_code(reason))

    def create(self, name: str, offer: Offer, request: NodeRequest, record: LeaseRecord) -> Pool:
        """As `Cloud.create`."""
        network = self._network or network_of(self._arm.list())
        body = new_pool(name, offer, request, record, spot_max_price=self._spot_max_price, network=network)
        try:
            made = self._kept(self._arm.put(name, body))
        except (LeaseLostError, CloudError) as exc:
            # Either it was there, or the request's first try has made it and only the answer was lost.
            if isinstance(exc, CloudError) and not (exc.code == BUSY and name in exc.message):
                raise
            return self._found(name, exc)
        if made is None:
            raise CloudError("AKS has made a pool without the tags that it was asked for with", place=name)
        return made

    def _found(self, name: str, why: LeaseLostError | CloudError) -> Pool:
        found = self._arm.get(name)
        if found is None:
            raise CloudError(f"not made: {why.message}", place=name, code=BUSY) from why
        pool = self._kept(found)
        if pool is None:
            raise InputError(
                "an agent pool of that name is there, without our tags",
                place=name,
                hint="it is not touched; rename it",
                code="pool-taken",
            ) from why
        return pool

    def mark(self, pool: Pool, record: LeaseRecord) -> Pool:
        """As `Cloud.mark`; an agent pool that AKS itself has changed meanwhile is written to all the same."""
        error: LeaseLostError | CloudError
        for attempt in range(_TRIES):
            found = self._as_looked_at(pool, attempt)
            now = pool_of(found) if found is not None else None
            if found is None or now is None or now.state == "deleting" or now.record not in (pool.record, record):
                raise LeaseLostError("somebody has changed or removed the pool", place=pool.name)
            if attempt and now.record == record:  # written by a try whose answer was lost
                return now
            try:
                return self._kept(self._arm.put(pool.name, marked(found, record), etag=now.version)) or now
            except (LeaseLostError, CloudError) as exc:
                error = _for_another_try(exc)
            if error.code == BUSY and attempt + 1 < _TRIES:
                time.sleep(_BUSY_SECONDS)
        raise error

    def delete(self, pool: Pool) -> None:
        """As `Cloud.delete`; where it is still being made, that is given up first."""
        error: LeaseLostError | CloudError
        now: Pool | None = pool
        for attempt in range(_TRIES):
            if now is None:
                return
            try:
                self._arm.delete(pool.name, now.version)
                return
            except (LeaseLostError, CloudError) as exc:
                error = _for_another_try(exc)
            now = self._unchanged(pool)
            if now is not None and error.code == BUSY:
                if now.state == "creating":
                    self._arm.abort(pool.name)
                if attempt + 1 < _TRIES:
                    time.sleep(_BUSY_SECONDS)
                    now = self._unchanged(pool)
        if now is not None:
            raise error

    def _unchanged(self, pool: Pool) -> Pool | None:
        """The pool as it is now, whose record must be the same; None if it is gone, or on its way."""
        found = self._arm.get(pool.name)
        now = self._kept(found) if found is not None else None
        if found is None or (now is not None and now.state == "deleting"):
            return None
        if now is None or now.record != pool.record:
            raise LeaseLostError("somebody has changed the pool", place=pool.name)
        return now

    def _as_looked_at(self, pool: Pool, attempt: int) -> AgentPool | None:
        known = self._read.get(pool.name)
        if not attempt and known is not None and known.properties and known.properties.e_tag == pool.version:
            return known
        return self._arm.get(pool.name)

    def _kept(self, found: AgentPool) -> Pool | None:
        pool = pool_of(found)
        if pool is not None:
            self._read[pool.name] = found
        return pool


def _for_another_try(error: LeaseLostError | CloudError) -> LeaseLostError | CloudError:
    """Let an error pass that another try may be spared: the ETag was old, or another operation runs."""
    if isinstance(error, CloudError) and error.code != BUSY:
        raise error
    return error
