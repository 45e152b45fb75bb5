"""Small objects for the cluster's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def make_pod(busybox: str) -> Make:
    """Return a Pod's manifest that runs a shell script; keys of `container` and `spec` are added."""

    def make(name: str, script: str = "", *, spec: dict[str, Any] | None = None, **container: Any) -> dict[str, Any]:
        main = {"name": "main", "image": busybox, **({"command": ["sh", "-c", script]} if script else {}), **container}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "containers": [main],
                **(spec or {}),
            },
        }

    return make


@pytest.fixture(scope="session")
def make_job(make_pod: Make) -> Make:
    """Return a Job's manifest that runs a shell script once."""

    def make(name: str, script: str = "true", **spec: Any) -> dict[str, Any]:
        pod = make_pod(name, script)["spec"]
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {"backoffLimit": 0, "template": {"spec": pod}, **spec},
        }

    return make


def config_map(name: str, labels: dict[str, str] | None = None, **data: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, **({"labels": labels} if labels else {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


@pytest.fixture(scope="session")
def make_config_map() -> Make:
    """Return a ConfigMap's manifest."""
    return config_map
