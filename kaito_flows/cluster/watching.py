"""Watches: one list, then one long request, for as long as somebody wants to know.

The API server ends a watch after some minutes, forgets old changes (410: list again), and goes away at times. None of
it is seen from outside: who watches gets each object's states in their order, never the same one twice, and the
deletion of what vanished unseen.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx

from kaito_flows.cluster.connection import Backoff, Busy, Connection
from kaito_flows.cluster.refusals import ExpiredError, Request, refusal
from kaito_flows.cluster.resources import Object, Resource
from kaito_flows.errors import InputError

_REQUEST_SECONDS = (240, 300)
_PAGE = "500"


class WatchEvent(NamedTuple):
    """What happened to an object: `ADDED`, `MODIFIED`, `DELETED`; or `ABSENT`, where nothing is there."""

    type: str
    object: Object


def watch(
    connection: Connection,
    kind: Resource,
    namespace: str,
    *,
    labels: str,
    fields: str,
    timeout_seconds: float | None,
    tell_absent: bool,
) -> Iterator[WatchEvent]:
    """Yield events; `Cluster.watch` says which."""
    return _Watch(connection, kind, namespace, labels, fields, timeout_seconds).events(tell_absent)


class _Watch:
    def __init__(
        self, connection: Connection, kind: Resource, namespace: str, labels: str, fields: str, timeout: float | None
    ) -> None:
        self._connection = connection
        self._kind = kind
        self._namespace = namespace
        self._path = kind.path(namespace)
        self._selectors = {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}
        self._until = None if timeout is None else time.monotonic() + timeout
        self._seen: dict[str, Object] = {}
        self._version = ""

    def events(self, tell_absent: bool) -> Iterator[WatchEvent]:
        backoff = Backoff(self._connection.patience_seconds)
        while True:
            if not self._version:
                yield from self._list()
                if tell_absent and not self._seen:
                    yield WatchEvent("ABSENT", {})
                tell_absent = False
            if self._left() <= 0:
                return
            try:
                for event in self._stream():
                    backoff.reset()
                    if event is not None:
                        yield event
            except ExpiredError:
                self._version = ""
            except httpx.ReadTimeout:
                continue
            except (httpx.TransportError, Busy) as exc:
                backoff.wait(exc, str(exc) or type(exc).__name__, at_most=self._left())
            except InputError as exc:
                if not backoff.in_doubt:
                    raise
                backoff.wait(exc, exc.message, at_most=self._left())

    def _left(self) -> float:
        return float("inf") if self._until is None else self._until - time.monotonic()

    def _list(self) -> Iterator[WatchEvent]:
        """List, and tell what differs from what was seen."""
        request = Request("list", self._kind, self._namespace)
        found: dict[str, Object] = {}
        params = {**self._selectors, "limit": _PAGE}
        while True:
            page = self._connection.request(request, "GET", self._path, params=params)
            for item in page["items"]:
                found[item["metadata"]["uid"]] = self._typed(item)
            self._version = page["metadata"]["resourceVersion"]
            if not page["metadata"].get("continue"):
                break
            params["continue"] = page["metadata"]["continue"]
        for uid in [uid for uid in self._seen if uid not in found]:
            yield WatchEvent("DELETED", self._seen.pop(uid))
        for item in found.values():
            yield from self._tell("ADDED", item)

    def _stream(self) -> Iterator[WatchEvent | None]:
        """Watch until the API server, the connection or the time ends it; None says that the connection works."""
        left = self._left()
        seconds = math.ceil(min(random.uniform(*_REQUEST_SECONDS), max(left, 1.0)))
        params = {
            **self._selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(seconds),
        }
        request = Request("watch", self._kind, self._namespace)
        read_seconds = max(0.05, min(seconds + 15.0, left))
        with self._connection.stream(request, self._path, params=params, read_seconds=read_seconds) as response:
            yield None
            for line in response.iter_lines():
                if line.strip():
                    yield from self._changes(request, json.loads(line))
                if self._left() <= 0:
                    return

    def _changes(self, request: Request, change: Object) -> Iterator[WatchEvent]:
        kind, item = change["type"], change["object"]
        if kind == "ERROR":
            raise refusal(request, int(item.get("code") or 500), json.dumps(item))
        self._version = item["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self._seen.pop(item["metadata"]["uid"], None)
            yield WatchEvent("DELETED", self._typed(item))
        elif kind != "BOOKMARK":
            yield from self._tell(kind, self._typed(item))

    def _tell(self, kind: str, item: Object) -> Iterator[WatchEvent]:
        uid, version = item["metadata"]["uid"], item["metadata"]["resourceVersion"]
        before = self._seen.get(uid)
        if before is None or before["metadata"]["resourceVersion"] != version:
            self._seen[uid] = item
            yield WatchEvent("ADDED" if before is None else "MODIFIED", item)

    def _typed(self, item: Object) -> Object:
        return {"apiVersion": self._kind.api_version, "kind": self._kind.kind} | item
