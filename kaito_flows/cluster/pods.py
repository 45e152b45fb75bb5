"""What a pod's dict says, read in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kaito_flows.cluster.resources import Object


class Container(NamedTuple):
    """A container that has a status; `first` is whether it is an init container."""

    name: str
    first: bool
    state: Mapping[str, Any]
    last_state: Mapping[str, Any]
    image: str

    def place(self, pod: Object) -> str:
        """Return the container as a user names it."""
        return f"{pod_place(pod)}, {'init container' if self.first else 'container'} {self.name}"


def containers_of(pod: Object) -> Iterator[Container]:
    """Yield the containers that have a status, the init containers first."""
    spec, status = pod.get("spec", {}), pod.get("status", {})
    for first, group, key in (
        (True, "initContainers", "initContainerStatuses"),
        (False, "containers", "containerStatuses"),
    ):
        images = {item["name"]: item.get("image", "") for item in spec.get(group) or []}
        for item in status.get(key) or []:
            state, last = item.get("state") or {}, item.get("lastState") or {}
            yield Container(item["name"], first, state, last, images.get(item["name"], item.get("image", "")))


def condition_of(pod: Object, kind: str) -> Object:
    """Return the pod's condition of that type; empty if it has none."""
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == kind:
            found: Object = condition
            return found
    return {}


def pod_place(pod: Object) -> str:
    """Return the pod as a user names it: `Pod team-a/phi-3-tuner-x7k2p`."""
    meta = pod["metadata"]
    return f"Pod {meta.get('namespace', '')}/{meta['name']}"


def node_of(pod: Object) -> str:
    """Return the pod's node in words."""
    name = pod.get("spec", {}).get("nodeName")
    return f"node {name}" if name else "its node"


def failed_container(pod: Object) -> str:
    """Return the name of the container that failed first, for who wants its log; empty if none did."""
    for item in containers_of(pod):
        terminated = item.state.get("terminated") or item.last_state.get("terminated") or {}
        if terminated.get("exitCode", 0) != 0:
            return item.name
    return ""
