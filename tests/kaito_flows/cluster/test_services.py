"""Services that are reached from outside, and Events that `kubectl describe` shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kaito_flows.cluster.gateway import Cluster

NAMESPACE = "gateway-services"
pytestmark = pytest.mark.cluster

Make = Callable[..., dict[str, Any]]


def test_a_service_answers_through_the_api_server(space: Cluster, make_pod: Make) -> None:
    serve = 'mkdir /tmp/www; echo \'{"Result": "hello"}\' >/tmp/www/chat; exec httpd -f -p 5000 -h /tmp/www'
    pod = make_pod("server", serve, readinessProbe={"tcpSocket": {"port": 5000}, "periodSeconds": 1})
    pod["metadata"]["labels"] = {"app": "server"}
    space.create(pod)
    port = {"name": "http", "port": 80, "targetPort": 5000, "protocol": "TCP"}
    spec = {"selector": {"app": "server"}, "ports": [port]}
    space.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "phi-3"}, "spec": spec})
    for _, found in space.watch("Pod", name="server", timeout_seconds=60):
        if any(c["type"] == "Ready" and c["status"] == "True" for c in found["status"].get("conditions", [])):
            break
    for _, endpoints in space.watch("Endpoints", name="phi-3", timeout_seconds=30):
        if any(subset.get("addresses") for subset in endpoints.get("subsets") or []):
            break
    with space.service_client("phi-3", 80) as client:
        assert client.get("/chat").json() == {"Result": "hello"}
        assert client.get("/nothing").status_code == 404


def test_an_event_that_comes_again_is_counted(space: Cluster, make_config_map: Make) -> None:
    target = space.create(make_config_map("told"))
    for _ in range(3):
        space.record_event(target, "Tuned", "step 10 of 20")
    space.record_event(target, "TuningFailed", "out of memory", "Warning")
    told = space.events(target)
    assert [(e["reason"], e["message"], e["type"], e["count"]) for e in told] == [
        ("Tuned", "step 10 of 20", "Normal", 3),
        ("TuningFailed", "out of memory", "Warning", 1),
    ]
    assert told[0]["source"] == {"component": "kaito-flows"}


def test_an_event_that_is_not_taken_fails_nothing(
    space: Cluster, make_config_map: Make, caplog: pytest.LogCaptureFixture
) -> None:
    target = space.create(make_config_map("untold"))
    target["metadata"]["namespace"] = "gateway-nowhere"
    space.record_event(target, "Tuned", "x" * 5000)
    assert "No Event for ConfigMap untold" in caplog.text
