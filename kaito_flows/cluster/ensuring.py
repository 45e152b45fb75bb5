"""Create, adopt or replace: one object of a name, whoever asks for it and however often."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kaito_flows.canonical import canonical_digest
from kaito_flows.cluster.labels import SPEC_HASH
from kaito_flows.cluster.refusals import ConflictError
from kaito_flows.cluster.resources import Object, resource
from kaito_flows.errors import ClusterError, InputError

if TYPE_CHECKING:
    from kaito_flows.cluster.gateway import Cluster

Outcome = Literal["created", "adopted", "replaced"]


class Ensured(NamedTuple):
    """What `Cluster.ensure` found or made."""

    object: Object
    outcome: Outcome


def spec_hash(manifest: Mapping[str, Any]) -> str:
    """Return the hash of what a manifest asks for, without the hash that it may carry already."""
    plain = copy.deepcopy(dict(manifest))
    annotations = plain.get("metadata", {}).get("annotations", {})
    annotations.pop(SPEC_HASH, None)
    if not annotations:
        plain.get("metadata", {}).pop("annotations", None)
    return canonical_digest(plain)


def ensure(cluster: Cluster, manifest: Mapping[str, Any], digest: str, timeout_seconds: float) -> Ensured:
    """Make it be there; `Cluster.ensure` says how."""
    wanted = copy.deepcopy(dict(manifest))
    digest = digest or spec_hash(manifest)
    wanted["metadata"].setdefault("annotations", {})[SPEC_HASH] = digest
    kind, name = f"{wanted['apiVersion']}/{wanted['kind']}", wanted["metadata"]["name"]
    cluster = cluster.within(wanted["metadata"].get("namespace") or cluster.namespace)
    deadline = time.monotonic() + timeout_seconds
    outcome: Outcome = "created"
    while True:
        try:
            return Ensured(cluster.create(wanted), outcome)
        except ConflictError:
            found = cluster.get(kind, name)
        if found is None:
            continue
        meta = found["metadata"]
        leaving = "deletionTimestamp" in meta
        made_from = meta.get("annotations", {}).get(SPEC_HASH)
        if made_from == digest and not leaving:
            return Ensured(found, "adopted")
        if not leaving:
            if made_from is None:
                raise InputError(
                    "there is one of this name that kaito-flows did not make",
                    place=f"{found['kind']} {cluster.namespace}/{name}",
                    hint=f"delete it, or rename one of the two: kubectl delete {found['kind'].lower()} {name}",
                    code="name-taken",
                )
            cluster.delete(kind, name, propagation="Foreground", uid=meta["uid"])
        outcome = "replaced"
        cluster.wait_gone(kind, name, uid=meta["uid"], timeout_seconds=max(0.0, deadline - time.monotonic()))


def wait_gone(cluster: Cluster, kind: str, name: str, uid: str | None, timeout_seconds: float) -> None:
    """Wait for the end; `Cluster.wait_gone` says how."""
    last: Object = {}
    for event, found in cluster.watch(kind, name=name, timeout_seconds=timeout_seconds, tell_absent=True):
        if event in ("DELETED", "ABSENT") or (uid is not None and found["metadata"]["uid"] != uid):
            return
        last = found
    finalizers = ", ".join(last.get("metadata", {}).get("finalizers", [])) or "none"
    raise ClusterError(
        f"it is not gone after {timeout_seconds:.0f} s",
        place=f"{resource(kind).kind} {cluster.namespace}/{name}",
        hint=f"its finalizers: {finalizers}; look whether their controllers run, and whether the node is up",
        code="deletion-stuck",
    )
