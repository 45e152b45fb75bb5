"""Rolling a service out on Kubernetes: the new revision stands and has answered before the Service leads to it.

    the revision's Deployment ─► a ready pod ─► Service `<name>-next` ─► the probe ─► Service `<name>` ─► old ones go

If anything before the last arrow fails, the new revision goes and the Service leads where it led: that is the rollback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx

from kaito_flows.canonical import canonical_digest
from kaito_flows.cluster.diagnosis import diagnose, pending_reason
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.labels import object_name, selector
from kaito_flows.errors import InputError, KaitoFlowsError, ServiceError
from kaito_flows.platforms import pods
from kaito_flows.platforms.base import Event, Service, ServiceSpec
from kaito_flows.platforms.following import patience_with
from kaito_flows.settings import Settings

Object = dict[str, Any]

_WATCH_SECONDS = 20.0
# A container that ends is started again by the kubelet; after so many times it will not come up.
_RESTARTS = 3
_MODELS_SECONDS = 30.0
_ENDPOINTS_SECONDS = 60.0


class RollOut:
    """Brings one revision of a Workspace's service up."""

    def __init__(self, cluster: Cluster, settings: Settings, owner: pods.Owner, spec: ServiceSpec) -> None:
        self._cluster, self._settings, self._owner = cluster, settings, owner
        self._arguments = {**spec.job.arguments, "root": "/", "host": "0.0.0.0", "port": pods.PORT}
        self._arguments["grace_seconds"] = pods.DRAIN_SECONDS
        self._name = object_name(owner.name)
        self._spec = self._named_by_all(spec)
        self._deployment = object_name(owner.name, self._spec.revision)

    @classmethod
    def current(cls, cluster: Cluster, workspace: str) -> Service | None:
        """The service that is up: the Service leads to a revision, one of whose pods is ready."""
        found = cluster.get("Service", object_name(workspace))
        revision = (found or {}).get("spec", {}).get("selector", {}).get(pods.REVISION_LABEL)
        if found is None or not revision:
            return None
        deployment = cluster.get("Deployment", object_name(workspace, revision))
        if deployment is None or not deployment.get("status", {}).get("readyReplicas"):
            return None
        models = tuple(deployment["metadata"].get("annotations", {}).get(_MODELS, "").split())
        nodes = pods.placed(deployment)
        return Service(workspace, _url(cluster, workspace), models, revision, adopted=True, nodes=nodes)

    def is_up(self) -> bool:
        """Whether the Service leads to this revision, and one of its pods is ready."""
        found = self.current(self._cluster, self._owner.name)
        return found is not None and found.revision == self._spec.revision

    def run(self, probe: Callable[[Service, httpx.Client], None], on_event: Callable[[Event], None]) -> Service:
        """Bring the revision up, hand it to `probe`, and let the Service lead to it.

        Raises:
            ServiceError: it did not come up.
            KaitoFlowsError: what became of its pod, or what `probe` raised; the Service leads where it led.
        """
        before = self.current(self._cluster, self._owner.name)
        adopted = before is not None and before.revision == self._spec.revision
        leading = self._leads(self._spec.revision)
        try:
            self._start()
            self._await_ready(on_event)
            service = self._try_out(probe, adopted=adopted)
        except BaseException:
            self._cluster.delete("Service", self._next)
            if not leading:
                self._remove(self._deployment)
            raise
        self._cluster.apply(pods.service(self._name, self._owner, self._spec))
        self._cluster.delete("Service", self._next)
        self._await_endpoints()
        for other in self._cluster.list("Deployment", labels=selector(self._owner.name, "server")):
            if other["metadata"]["name"] != self._deployment:
                self._remove(other["metadata"]["name"])
        return service

    @property
    def _next(self) -> str:
        return object_name(self._owner.name, self._spec.revision, "next")

    @property
    def _labels(self) -> dict[str, str]:
        return {**selector(self._owner.name, "server"), pods.REVISION_LABEL: self._spec.revision}

    def _named_by_all(self, spec: ServiceSpec) -> ServiceSpec:
        """The spec with a revision that also stands for our image, the settings, and whatever else shapes a pod.

        So nothing that serves is ever changed: what differs is another revision, and comes up beside the old one.
        """
        manifest = pods.deployment(spec, self._owner, self._settings, self._name)
        config = pods.config_map(spec.job, self._owner, self._settings, self._arguments)
        everything = {"deployment": pods.without_placement(manifest), "config": config["data"]}
        revision = canonical_digest(everything)[:12]
        return replace(spec, revision=revision, job=replace(spec.job, name=f"{self._owner.name}-{revision}"))

    def _leads(self, revision: str) -> bool:
        found = self._cluster.get("Service", self._name) or {}
        return bool(found.get("spec", {}).get("selector", {}).get(pods.REVISION_LABEL) == revision)

    def _start(self) -> None:
        self._cluster.apply(pods.config_map(self._spec.job, self._owner, self._settings, self._arguments))
        manifest = pods.deployment(self._spec, self._owner, self._settings, self._deployment)
        found = self._cluster.ensure(manifest, digest=self._spec.revision)
        pinned = pods.placed(found.object)
        wanted = set(pods.placed(manifest))
        if pinned and wanted and wanted.isdisjoint(pinned):
            # Its nodes are no longer the Workspace's: Kubernetes brings it to the new ones, one pod after the other.
            affinity = manifest["spec"]["template"]["spec"]["affinity"]
            changes = {"spec": {"template": {"spec": {"affinity": affinity}}}}
            self._cluster.patch("Deployment", self._deployment, changes)

    def _await_ready(self, on_event: Callable[[Event], None]) -> None:
        """Wait until a pod is ready; what one suffers from may pass, and is given the time that such things take."""
        deadline = time.monotonic() + pods.startup_seconds(self._spec.job.weights)
        faults: dict[str, tuple[KaitoFlowsError, float]] = {}
        told, seen = "", False
        while time.monotonic() < deadline:
            for kind, pod in self._cluster.watch("Pod", labels=self._labels, timeout_seconds=_WATCH_SECONDS):
                uid = pod["metadata"]["uid"]
                if kind == "DELETED" or pod["metadata"].get("deletionTimestamp"):
                    faults.pop(uid, None)
                    continue
                seen = True
                if _is_ready(pod):
                    return
                if (reason := pending_reason(pod)) and reason != told:
                    told = reason
                    on_event({"event": "stage", "name": f"waiting: {reason}"})
                error = self._fault(pod)
                if error is None:
                    faults.pop(uid, None)
                elif _is_final(pod, error):
                    raise error
                else:
                    faults[uid] = (error, faults.get(uid, (error, time.monotonic()))[1])
                self._give_up(faults)
            self._give_up(faults)
            if not seen:
                self._refuse_no_pod()
        place = f"Deployment/{self._deployment}"
        raise ServiceError("not healthy in the time it has", place=place, hint="kubectl logs tells what it does")

    def _give_up(self, faults: Mapping[str, tuple[KaitoFlowsError, float]]) -> None:
        for error, since in faults.values():
            patience = patience_with(error, self._settings.pending_seconds)
            if time.monotonic() - since > patience:
                raise error

    def _refuse_no_pod(self) -> None:
        """Raise if no pod may be made at all: a quota, a LimitRange, pod security, an admission webhook."""
        found = self._cluster.get("Deployment", self._deployment) or {}
        for condition in found.get("status", {}).get("conditions", ()):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                hint = "the namespace's rules refuse it: kubectl describe namespace"
                said = f"its pod cannot be made: {condition.get('message', '')}"
                raise InputError(said, place=f"Deployment/{self._deployment}", hint=hint, code="pod-refused")

    def _fault(self, pod: Object) -> KaitoFlowsError | None:
        if not _ended_once(pod) and pod.get("status", {}).get("phase") != "Pending":
            return None
        logs = ""
        if _ended_once(pod):
            name = pod["metadata"]["name"]
            logs = self._cluster.read_logs(name, pods.container_of(self._spec), tail=5, previous=True)
        return diagnose(pod, log_tail=logs, waited=True)

    def _try_out(self, probe: Callable[[Service, httpx.Client], None], *, adopted: bool) -> Service:
        self._cluster.apply(pods.service(self._next, self._owner, replace(self._spec, public=False)))
        with self._cluster.service_client(self._next, 80) as http:
            models = () if self._spec.template is not None else _models(http)
            url = _url(self._cluster, self._owner.name)
            nodes = self._nodes()
            service = Service(self._owner.name, url, models, self._spec.revision, adopted=adopted, nodes=nodes)
            probe(service, http)
        annotations = {"metadata": {"annotations": {_MODELS: " ".join(models)}}}
        self._cluster.patch("Deployment", self._deployment, annotations)
        return service

    def _nodes(self) -> tuple[str, ...]:
        """The nodes that the pods are bound to; a pod template may have its own ways of choosing one."""
        if pinned := pods.placed(self._cluster.get("Deployment", self._deployment) or _NOWHERE):
            return pinned
        found = {pod["spec"].get("nodeName", "") for pod in self._cluster.list("Pod", labels=self._labels)}
        return tuple(sorted(found - {""}))

    def _await_endpoints(self) -> None:
        """Wait until the Service leads to this revision's pods and to no others, so that those may go.

        Raises:
            ServiceError: (code `not-led-to`) Kubernetes does not say so; the old revision stays.
        """
        for _, found in self._cluster.watch("Endpoints", name=self._name, timeout_seconds=_ENDPOINTS_SECONDS):
            addresses = [one for subset in found.get("subsets") or () for one in subset.get("addresses") or ()]
            led_to = {one.get("targetRef", {}).get("name") for one in addresses}
            if led_to and led_to <= {pod["metadata"]["name"] for pod in self._cluster.list("Pod", labels=self._labels)}:
                return
        place = f"Service/{self._name}"
        hint = "is the pod still Ready, and does the cluster's endpoints controller run?"
        raise ServiceError("does not lead to the new pods", place=place, hint=hint, code="not-led-to")

    def _remove(self, deployment: str) -> None:
        self._cluster.delete("Deployment", deployment)
        self._cluster.delete("ConfigMap", deployment)


_MODELS = "kaito-flows/models"
_NOWHERE: Object = {"spec": {"template": {"spec": {}}}}


def _url(cluster: Cluster, workspace: str) -> str:
    return f"http://{object_name(workspace)}.{cluster.namespace}.svc"


def _models(http: httpx.Client) -> tuple[str, ...]:
    """What the server says it serves; its address may be known to the nodes a moment later than its readiness."""
    deadline = time.monotonic() + _MODELS_SECONDS
    while True:
        try:
            answer = http.get("/v1/models", timeout=10.0)
            if answer.status_code == 200:
                return tuple(model["id"] for model in answer.json()["data"])
            reason = f"answered {answer.status_code}: {answer.text[:200]}"
        except httpx.TransportError as exc:
            reason = f"does not answer: {exc or type(exc).__name__}"
        if time.monotonic() > deadline:
            raise ServiceError(reason, place=str(http.base_url), hint="a network policy may keep the run away from it")
        time.sleep(0.5)


def _is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))


def _statuses(pod: Object) -> list[Object]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _ended_once(pod: Object) -> bool:
    return any(
        one.get("lastState", {}).get("terminated") or one.get("state", {}).get("terminated", {}).get("exitCode")
        for one in _statuses(pod)
    )


def _is_final(pod: Object, error: KaitoFlowsError) -> bool:
    """Whether waiting cannot help: what the input is at fault for, and what ended again and again."""
    restarts = max((one.get("restartCount", 0) for one in _statuses(pod)), default=0)
    told = isinstance(error, InputError) and error.code not in ("secret-not-found", "config-map-not-found")
    return restarts >= _RESTARTS or told
