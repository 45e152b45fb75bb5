"""Kubernetes Events: what the cluster says about an object, and what kaito-flows adds to it.

`kubectl describe` shows them. They are kept for an hour, and are no reason for a run to fail.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from kaito_flows.canonical import canonical_digest
from kaito_flows.cluster.labels import FIELD_MANAGER, object_name
from kaito_flows.cluster.refusals import ConflictError
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import KaitoFlowsError

if TYPE_CHECKING:
    from kaito_flows.cluster.gateway import Cluster

logger = logging.getLogger(__name__)

EventType = Literal["Normal", "Warning"]
_MAX_MESSAGE = 1024
_PATIENCE_SECONDS = 5.0


def events_of(cluster: Cluster, target: Object) -> list[Object]:
    """Return the Events about an object, newest last."""
    found = cluster.list("Event", fields={"involvedObject.uid": target["metadata"]["uid"]})
    return sorted(found, key=_last_seen)


def record(cluster: Cluster, target: Object, reason: str, message: str, kind: EventType) -> None:
    """Add an Event to an object; `Cluster.record_event` says how."""
    meta = target["metadata"]
    involved = {
        "apiVersion": target["apiVersion"],
        "kind": target["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        **({"namespace": meta["namespace"]} if "namespace" in meta else {}),
    }
    message = message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 2]} …"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = object_name(meta["name"], canonical_digest([meta["uid"], reason, message, kind])[:16])
    event: Object = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": meta.get("namespace", "default")},
        "involvedObject": involved,
        "reason": reason,
        "message": message,
        "type": kind,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": "",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    hasty = cluster.patient(_PATIENCE_SECONDS).within(event["metadata"]["namespace"])
    try:
        try:
            hasty.create(event)
        except ConflictError:
            before = hasty.get("Event", name) or event
            hasty.patch("Event", name, {"count": before.get("count", 1) + 1, "lastTimestamp": now})
    except KaitoFlowsError as exc:
        logger.warning("No Event for %s %s: %s", target["kind"], meta["name"], exc)


def _last_seen(event: Object) -> tuple[str, int, str]:
    meta, series = event["metadata"], event.get("series") or {}
    moment = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    # Within a second, by what the API server wrote last.
    version = meta["resourceVersion"]
    return str(moment or meta["creationTimestamp"])[:19], len(version), version
