"""Logs of real pods, followed over a line that breaks: every line once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cluster_fixtures import Proxy

from kaito_flows.cluster.connection import Connection
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.logs import LogLine, _nanoseconds, _Told
from kaito_flows.errors import InputError

NAMESPACE = "gateway-logs"
cluster_only = pytest.mark.cluster

Make = Callable[..., dict[str, Any]]
BOTH_STREAMS = "i=0; while [ $i -lt {n} ]; do echo out $i; echo err $i >&2; i=$((i+1)); sleep {pause}; done"


def texts(lines: list[LogLine], head: str = "") -> list[str]:
    return [line.text for line in lines if line.text.startswith(head)]


@cluster_only
def test_every_line_comes_once_though_the_connection_breaks(space: Cluster, proxy: Proxy, make_pod: Make) -> None:
    far = Cluster.connect(space.namespace)
    space.create(make_pod("breaks", BOTH_STREAMS.format(n=150, pause=0.05)))
    lines: list[LogLine] = []
    stop = threading.Event()

    def break_often() -> None:
        while not stop.wait(1.3):
            proxy.drop()

    breaker = threading.Thread(target=break_often)
    breaker.start()
    try:
        far.follow_logs("breaks", on_line=lines.append)
    finally:
        stop.set()
        breaker.join()
    assert proxy.connections > 5
    for stream in ("out", "err"):
        assert texts(lines, stream) == [f"{stream} {i}" for i in range(150)]


@cluster_only
def test_what_was_written_while_the_api_server_was_away_is_caught_up(
    space: Cluster, proxy: Proxy, make_pod: Make
) -> None:
    far = Cluster.connect(space.namespace)
    space.create(make_pod("away", BOTH_STREAMS.format(n=20, pause=0.5)))
    lines: list[LogLine] = []

    def on_line(line: LogLine) -> None:
        lines.append(line)
        if line.text == "out 3":
            proxy.cut_for(20)

    far.follow_logs("away", on_line=on_line)
    assert texts(lines, "out") == [f"out {i}" for i in range(20)]
    assert texts(lines, "err") == [f"err {i}" for i in range(20)]


@cluster_only
def test_following_goes_on_from_the_last_line_that_somebody_else_had(space: Cluster, make_pod: Make) -> None:
    space.create(make_pod("since", "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done"))
    lines: list[LogLine] = []
    space.follow_logs("since", on_line=lines.append)
    assert texts(lines) == ["1", "2", "3", "4", "5"]
    rest: list[LogLine] = []
    space.follow_logs("since", on_line=rest.append, since=lines[2].time)
    assert rest == lines[3:]


@cluster_only
def test_the_same_text_many_times_is_as_many_lines_and_a_long_one_is_whole(space: Cluster, make_pod: Make) -> None:
    long = "head -c 50000 /dev/zero | tr '\\0' x; echo"
    space.create(make_pod("same", f"for i in $(seq 500); do echo same; done; {long}; printf 'no end'"))
    lines: list[LogLine] = []
    space.follow_logs("same", on_line=lines.append)
    assert texts(lines) == ["same"] * 500 + ["x" * 50000, "no end"]


@cluster_only
def test_a_container_that_has_not_started_is_waited_for_without_polling(space: Cluster, make_pod: Make) -> None:
    first = {"name": "first", "image": make_pod("x")["spec"]["containers"][0]["image"], "command": ["sleep", "6"]}
    space.create(make_pod("waits", "echo started", spec={"initContainers": [first]}))
    own, asked = Cluster.connect(space.namespace), []
    own.connection.http.event_hooks = {"request": [asked.append]}
    lines: list[LogLine] = []
    own.follow_logs("waits", on_line=lines.append)
    assert texts(lines) == ["started"]
    assert len(asked) < 10


def test_a_kubelet_that_has_not_heard_of_the_pod_yet_is_asked_again() -> None:
    """What a 1.20 kubelet said of a pod in the moment after it was bound, for the log; it is listed all the while."""
    said = "the server could not find the requested resource ( pods/log waits)"
    unknown = httpx.Response(404, json={"kind": "Status", "message": said, "reason": "NotFound", "code": 404})
    log = httpx.Response(200, text="2026-11-26T05:30:00.5Z started\n")
    logs = [unknown, log, unknown, log]

    def pod(version: str, **state: Any) -> dict[str, Any]:
        statuses = [{"name": "main", "state": state}]
        spec = {"containers": [{"name": "main"}], "restartPolicy": "Never"}
        metadata = {"name": "waits", "uid": "1", "resourceVersion": version}
        return {"kind": "Pod", "metadata": metadata, "spec": spec, "status": {"containerStatuses": statuses}}

    running, ended = pod("2", running={}), pod("3", terminated={"exitCode": 0})

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/log"):
            return logs.pop(0)
        if "watch" in request.url.params:
            return httpx.Response(200, text=json.dumps({"type": "MODIFIED", "object": running}) + "\n")
        waiting = pod("1", waiting={"reason": "ContainerCreating"})
        if request.url.path.endswith("/waits"):
            return httpx.Response(200, json=waiting if len(logs) == 3 else ended)
        return httpx.Response(200, json={"items": [waiting], "metadata": {"resourceVersion": "1"}})

    http = httpx.Client(base_url="https://server", transport=httpx.MockTransport(answer))
    lines: list[LogLine] = []
    Cluster(Connection("https://server", http, False, None, 1.0), "n").follow_logs("waits", on_line=lines.append)
    assert texts(lines) == ["started"]
    assert not logs


@cluster_only
def test_a_pod_that_has_no_node_for_longer_than_patience_is_waited_for(space: Cluster, make_pod: Make) -> None:
    space.create(make_pod("nowhere", "echo here", spec={"nodeSelector": {"there": "is-none"}}))
    lines: list[LogLine] = []
    follower = threading.Thread(
        target=lambda: space.patient(2).follow_logs("nowhere", on_line=lines.append), daemon=True
    )
    follower.start()
    follower.join(8)
    assert follower.is_alive()
    space.delete("Pod", "nowhere", grace_seconds=0)
    follower.join(30)
    assert not follower.is_alive()
    assert lines == []


@cluster_only
def test_a_pod_that_is_gone_ends_it(space: Cluster, make_pod: Make) -> None:
    space.create(make_pod("gone", "echo here; sleep 300"))
    lines: list[LogLine] = []
    began = time.monotonic()
    space.follow_logs("gone", on_line=lambda line: (lines.append(line), space.delete("Pod", "gone", grace_seconds=0)))
    assert texts(lines) == ["here"]
    assert time.monotonic() - began < 30
    space.follow_logs("gone", on_line=lines.append)
    assert texts(lines) == ["here"]
    assert space.read_logs("gone") == ""


@cluster_only
def test_what_the_caller_raises_reaches_the_caller(space: Cluster, make_pod: Make) -> None:
    space.create(make_pod("raises", "echo here"))

    def refuse(line: LogLine) -> None:
        raise KeyError(line.text)

    with pytest.raises(KeyError, match="here"):
        space.follow_logs("raises", on_line=refuse)
    with pytest.raises(InputError, match="nobody is not valid for pod raises"):
        space.follow_logs("raises", "nobody", on_line=refuse)


@cluster_only
def test_the_last_lines_can_be_read(space: Cluster, make_pod: Make) -> None:
    space.create(make_pod("tail", "seq 100"))
    space.follow_logs("tail", on_line=lambda line: None)
    assert space.read_logs("tail", "main", tail=2) == "99\n100\n"


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("2026-11-25T17:54:10.140459110Z", 140459110),
        ("2026-11-25T17:54:10.14Z", 140000000),
        ("2026-11-25T17:54:10Z", 0),
        ("2026-11-25T19:54:10.000000001+02:00", 1),
    ],
)
def test_times_are_read_to_the_nanosecond(text: str, fraction: int) -> None:
    assert _nanoseconds(text) == 1795629250 * 10**9 + fraction


def test_lines_out_of_order_around_a_break_are_neither_lost_nor_doubled() -> None:
    early = LogLine("2026-11-25T17:54:10.1Z", "out")
    late = LogLine("2026-11-25T17:54:10.2Z", "err")
    told = _Told("")
    none = told.repeated()
    assert told.new(late, none)
    assert told.params() == {"sinceTime": "2026-11-25T17:54:08Z"}
    again = told.repeated()
    assert [told.new(line, again) for line in (late, early, late)] == [False, True, True]
