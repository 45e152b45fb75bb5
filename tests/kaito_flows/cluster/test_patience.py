"""What is asked again and what is not, by the answers of an API server that is in trouble."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kaito_flows.cluster import connection
from kaito_flows.cluster.connection import Connection
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError, ClusterError, InputError, KaitoFlowsError

FORBIDDEN = 'pods is forbidden: User "me" cannot list resource "pods" in API group "" in the namespace "n"'
Answer = "tuple[int, str] | Exception"


def status(code: int, message: str) -> tuple[int, str]:
    return code, json.dumps({"kind": "Status", "message": message, "code": code})


FOUND = (200, json.dumps({"items": [], "metadata": {"resourceVersion": "1"}}))
REFUSED = httpx.ConnectError("connection refused")
NO = status(403, FORBIDDEN)
NO_ROUTE = (404, "404 page not found\n")
ETCD = status(500, "etcdserver: leader changed")


def cluster_that_answers(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> tuple[Cluster, list[httpx.Request]]:
    monkeypatch.setattr(connection, "MAX_BACKOFF_SECONDS", 0.01)
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        said = answers[min(len(asked), len(answers)) - 1]
        if isinstance(said, Exception):
            raise said
        return httpx.Response(said[0], text=said[1])

    http = httpx.Client(base_url="https://server", transport=httpx.MockTransport(answer))
    return Cluster(Connection("https://server", http, False, None, 1.0), "n"), asked


@pytest.mark.parametrize(
    "trouble",
    [
        [REFUSED, REFUSED],
        [httpx.ReadError("reset"), (503, "not ready")],
        [(429, "slow down"), (502, ""), (504, "")],
        [ETCD, ETCD],
        [REFUSED, NO, NO_ROUTE, status(401, "Unauthorized")],
    ],
    ids=["away", "reset", "busy", "etcd", "just up"],
)
def test_an_api_server_in_trouble_is_asked_again(monkeypatch: pytest.MonkeyPatch, trouble: list[Any]) -> None:
    cluster, asked = cluster_that_answers(monkeypatch, [*trouble, FOUND])
    assert cluster.list("Pod") == []
    assert len(asked) == len(trouble) + 1


@pytest.mark.parametrize(
    ("answer", "cls", "tries"),
    [
        (NO, AccessError, 1),
        (NO_ROUTE, InputError, 1),
        (status(422, "bad"), InputError, 1),
        (status(500, "it stays broken"), ClusterError, 5),
    ],
)
def test_what_stays_wrong_is_told(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], cls: type[KaitoFlowsError], tries: int
) -> None:
    cluster, asked = cluster_that_answers(monkeypatch, [answer])
    with pytest.raises(cls):
        cluster.list("Pod")
    assert len(asked) == tries


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = cluster_that_answers(monkeypatch, [REFUSED])
    with pytest.raises(ClusterError, match=r"does not answer since [01] s: connection refused") as failure:
        cluster.patient(0.1).list("Pod")
    assert failure.value.retryable


def test_an_admission_rule_that_says_no_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, _ = cluster_that_answers(monkeypatch, [status(403, 'violates PodSecurity "restricted:latest"')])
    with pytest.raises(AccessError, match=r"admission-refused: .*violates PodSecurity"):
        cluster.list("Pod")
