"""Watches on a real cluster, over a line that is dropped, cut, and mended."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cluster_fixtures import Proxy

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.resources import resource
from kaito_flows.cluster.watching import WatchEvent, _Watch
from kaito_flows.errors import ClusterError

NAMESPACE = "gateway-watch"
pytestmark = pytest.mark.cluster

Make = Callable[..., dict[str, Any]]
Seen = "queue.Queue[tuple[str, str]]"


@contextmanager
def watched(cluster: Cluster, **what: Any) -> Iterator[queue.Queue[tuple[str, str]]]:
    """Watch ConfigMaps from another thread; yield the queue of what it tells: the event, and the key `n`."""
    told: queue.Queue[tuple[str, str]] = queue.Queue()

    def watch() -> None:
        for event, found in cluster.watch("ConfigMap", **what):
            told.put((event, found["data"]["n"]))

    threading.Thread(target=watch, daemon=True).start()
    yield told


def test_changes_are_told_once_and_in_their_order_over_dropped_connections(
    space: Cluster, proxy: Proxy, make_config_map: Make
) -> None:
    name, labels = "dropped", {"watch": "dropped"}
    space.create(make_config_map(name, labels, n="0"))
    with watched(Cluster.connect(space.namespace), labels=labels) as told:
        assert told.get(timeout=10) == ("ADDED", "0")
        for n in range(1, 16):
            space.patch("ConfigMap", name, {"data": {"n": str(n)}})
            if n % 3 == 0:
                proxy.drop()
            time.sleep(0.1)
        assert [told.get(timeout=30) for _ in range(15)] == [("MODIFIED", str(n)) for n in range(1, 16)]
        space.delete("ConfigMap", name)
        assert told.get(timeout=10) == ("DELETED", "15")
        with pytest.raises(queue.Empty):
            told.get(timeout=1)


def test_a_watch_outlives_an_api_server_that_is_away(space: Cluster, proxy: Proxy, make_config_map: Make) -> None:
    labels = {"watch": "away"}
    for name in ("stays", "goes"):
        space.create(make_config_map(name, labels, n=name))
    with watched(Cluster.connect(space.namespace), labels=labels) as told:
        assert {told.get(timeout=10), told.get(timeout=10)} == {("ADDED", "stays"), ("ADDED", "goes")}
        outage = proxy.cut_for(20)
        time.sleep(1)
        space.delete("ConfigMap", "goes")
        space.create(make_config_map("comes", labels, n="comes"))
        with pytest.raises(queue.Empty):
            told.get(timeout=15)
        outage.join()
        assert [told.get(timeout=40), told.get(timeout=10)] == [("DELETED", "goes"), ("ADDED", "comes")]


def test_what_the_api_server_has_forgotten_is_found_by_listing_again(space: Cluster, make_config_map: Make) -> None:
    labels = {"watch": "forgotten"}
    for name in ("same", "changed", "gone"):
        space.create(make_config_map(name, labels, n=name))
    watch = _Watch(space.connection, resource("ConfigMap"), space.namespace, "watch=forgotten", "", 10)
    events = watch.events(tell_absent=False)
    assert sorted(next(events).object["data"]["n"] for _ in range(3)) == ["changed", "gone", "same"]
    space.patch("ConfigMap", "changed", {"data": {"n": "new"}})
    space.delete("ConfigMap", "gone")
    watch._version = "1"  # so old that the API server answers 410
    assert [(e.type, e.object["data"]["n"]) for e in (next(events), next(events))] == [
        ("DELETED", "gone"),
        ("MODIFIED", "new"),
    ]


def test_patience_ends(space: Cluster, proxy: Proxy) -> None:
    hasty = Cluster.connect(space.namespace, patience_seconds=3)
    events = hasty.watch("ConfigMap", name="absent", tell_absent=True)
    assert next(events) == WatchEvent("ABSENT", {})
    proxy.cut()
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"cluster-unavailable: the API server does not answer"):
        next(events)
    assert time.monotonic() - began < 5
    with pytest.raises(ClusterError, match="cluster-unavailable"):
        hasty.get("ConfigMap", "absent")


def test_a_request_waits_for_an_api_server_that_is_away(space: Cluster, proxy: Proxy, make_config_map: Make) -> None:
    far = Cluster.connect(space.namespace)
    proxy.cut_for(4)
    time.sleep(0.5)
    assert far.ensure(make_config_map("waits")).outcome == "created"


def test_a_watch_ends_on_time_and_costs_two_requests(space: Cluster, make_config_map: Make) -> None:
    space.create(make_config_map("still", n="1"))
    own, asked = Cluster.connect(space.namespace), []
    own.connection.http.event_hooks = {"request": [asked.append]}
    began = time.monotonic()
    events = list(own.watch("ConfigMap", name="still", timeout_seconds=3.5))
    assert 3.4 < time.monotonic() - began < 4.5
    assert [event.type for event in events] == ["ADDED"]
    assert len(asked) == 2
