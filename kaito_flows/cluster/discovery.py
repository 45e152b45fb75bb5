"""What an API server tells of itself: which kinds it serves, in which versions, and what time it has."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from kaito_flows.cluster.connection import Connection
from kaito_flows.cluster.refusals import MissingError, Request
from kaito_flows.cluster.resources import Resource
from kaito_flows.errors import ClusterError, InputError


def served(connection: Connection, kind: Resource) -> list[str]:
    """Return the API versions of a kind's group that have the kind; `Cluster.served` says more."""
    group = _read(connection, kind, f"/apis/{kind.group}")
    preferred = group.get("preferredVersion", {}).get("groupVersion", "")
    versions = sorted((v["groupVersion"] for v in group.get("versions", [])), key=lambda v: v != preferred)
    return [
        version
        for version in versions
        if any(item["kind"] == kind.kind for item in _read(connection, kind, f"/apis/{version}").get("resources", []))
    ]


def server_time(connection: Connection) -> datetime:
    """Return the time by the API server's clock, to the second, in UTC.

    Raises:
        ClusterError: its answer has no `Date`.
    """
    request = Request("get", Resource("", "API server", "version", namespaced=False))
    date = connection.headers(request, "/version").get("Date", "")
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except ValueError as exc:
        hint = "a proxy in front of it may have taken it away"
        raise ClusterError(f"the API server does not say what time it has: {date!r}", hint=hint) from exc


def _read(connection: Connection, kind: Resource, path: str) -> dict[str, Any]:
    try:
        return connection.request(Request("list", kind), "GET", path)
    except MissingError:
        return {}
    except InputError as exc:
        if exc.code != "crd-not-installed":
            raise
        return {}
