"""The one gateway to the Kubernetes API.

Objects are plain dicts as YAML has them. Everything can be asked twice: what is there is adopted, what is gone stays
gone, and an API server that is away is waited for. Requests are few: what takes time is watched, not polled.

Every method raises, besides what it names: `AccessError` when the API server says no, naming verb, resource and
namespace; `InputError` (`crd-not-installed`, `namespace-not-found`, `invalid-object`, `quota-exceeded`) when it cannot
take what it is given; `ClusterError` when it does not answer for longer than the patience given to `Cluster.connect`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import httpx

from kaito_flows.cluster import labels as names
from kaito_flows.cluster.connection import PATIENCE_SECONDS, Connection, connect
from kaito_flows.cluster.discovery import served, server_time
from kaito_flows.cluster.ensuring import Ensured, ensure, wait_gone
from kaito_flows.cluster.logs import LogLine, follow, read
from kaito_flows.cluster.records import EventType, events_of, record
from kaito_flows.cluster.refusals import ConflictError, MissingError, Request
from kaito_flows.cluster.resources import Object, Resource, resource, resource_of, selector
from kaito_flows.cluster.rights import Right, may, missing
from kaito_flows.cluster.watching import WatchEvent, watch
from kaito_flows.errors import InputError

Propagation = Literal["Foreground", "Background", "Orphan"]
Objects = list[Object]
Names = list[str]
Rights = list[Right]
_PAGE = 500
_GONE_SECONDS = 120.0


@dataclass(frozen=True)
class Cluster:
    """A namespace of a cluster. Threads can share it."""

    connection: Connection
    namespace: str

    @classmethod
    def connect(
        cls, namespace: str | None = None, context: str | None = None, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> Cluster:
        """Return the cluster that a context or `$KUBECONFIG` names, else the one this runs in, else kubectl's.

        Nothing is asked of the API server yet. `patience_seconds` is for how long it may be away later.

        Raises:
            InputError: `no-cluster`: there is no configuration, or it cannot be read.
            AccessError: `not-logged-in`: the kubeconfig's login plug-in gave nothing.
        """
        connection, usual = connect(context, patience_seconds=patience_seconds)
        return cls(connection, namespace or usual)

    def within(self, namespace: str) -> Cluster:
        """Return the same cluster with another namespace."""
        return replace(self, namespace=namespace)

    def patient(self, seconds: float) -> Cluster:
        """Return the same cluster for one who waits no longer than this for an API server that is away."""
        return replace(self, connection=replace(self.connection, patience_seconds=seconds))

    # --- one object ---------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Object | None:
        """Return the object, or None when there is none of that name."""
        try:
            return self._ask("GET", "get", resource(kind), name)
        except MissingError:
            return None

    def create(self, manifest: Mapping[str, Any]) -> Object:
        """Create the object.

        Raises:
            ConflictError: there is one of that name.
        """
        namespace = manifest.get("metadata", {}).get("namespace")
        return self._ask("POST", "create", resource_of(manifest), body=manifest, namespace=namespace)

    def apply(self, manifest: Mapping[str, Any], force: bool = True) -> Object:
        """Create the object or change what the manifest says of it, by server-side apply; return it.

        Fields that an earlier manifest named and this one does not are taken back; other managers' fields stay.

        Raises:
            ConflictError: not `force`, and somebody else manages one of the fields.
        """
        return self._apply(manifest, "", names.FIELD_MANAGER, force)

    def apply_status(self, manifest: Mapping[str, Any]) -> Object | None:
        """Set the manifest's `status`, by server-side apply; return the object, or None when it is gone.

        So it is when another one has its name by now, and the manifest names the `uid`.
        """
        meta = manifest["metadata"]
        only = {key: meta[key] for key in ("name", "namespace", "uid") if key in meta}
        body = {key: manifest[key] for key in ("apiVersion", "kind", "status")} | {"metadata": only}
        # Before 1.22, a manager's fields of the object and of its status are one set: to apply one drops the other.
        try:
            return self._apply(body, "status", f"{names.FIELD_MANAGER}-status", force=True)
        except MissingError:
            return None
        except ConflictError:
            if "uid" not in only:
                raise
            return None

    def patch(self, kind: str, name: str, changes: Mapping[str, Any], subresource: str = "") -> Object | None:
        """Change the object by a JSON merge patch; return it, or None when it is gone.

        Raises:
            ConflictError: `changes` name a `metadata.resourceVersion` that is no longer the newest.
        """
        try:
            return self._ask(
                "PATCH",
                "patch",
                resource(kind),
                name,
                subresource,
                body=changes,
                content_type="application/merge-patch+json",
                params={"fieldManager": names.FIELD_MANAGER},
            )
        except MissingError:
            return None

    def delete(
        self,
        kind: str,
        name: str,
        *,
        grace_seconds: int | None = None,
        propagation: Propagation = "Background",
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> bool:
        """Delete the object, or only the one with that `uid`; return whether there was one.

        It may still be there afterwards, with a `deletionTimestamp`: `wait_gone` waits.

        Raises:
            ConflictError: `resource_version` is not the newest.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        conditions = {"uid": uid, "resourceVersion": resource_version}
        if wanted := {key: value for key, value in conditions.items() if value is not None}:
            options["preconditions"] = wanted
        try:
            self._ask("DELETE", "delete", resource(kind), name, body=options)
        except MissingError:
            return False
        except ConflictError:
            if uid is None or resource_version is not None:
                raise
            return False
        return True

    def ensure(
        self, manifest: Mapping[str, Any], *, digest: str = "", timeout_seconds: float = _GONE_SECONDS
    ) -> Ensured:
        """Create the object, or adopt the one of that name that was made from the same `digest`.

        One that was made from another is deleted first, with all that belongs to it. `digest` is `spec_hash` of the
        manifest unless given. However many call this at once, there is one object afterwards.

        Raises:
            InputError: `name-taken`: the object of that name was not made by kaito-flows.
            ClusterError: `deletion-stuck`: the old one was not gone after `timeout_seconds`.
        """
        return ensure(self, manifest, digest, timeout_seconds)

    def wait_gone(
        self, kind: str, name: str, *, uid: str | None = None, timeout_seconds: float = _GONE_SECONDS
    ) -> None:
        """Wait until the object, or the one with that `uid`, is gone.

        Raises:
            ClusterError: `deletion-stuck`: it is still there after `timeout_seconds`.
        """
        wait_gone(self, kind, name, uid, timeout_seconds)

    # --- many ---------------------------------------------------------------------------------------------------------

    def list(
        self,
        kind: str,
        *,
        labels: Mapping[str, str] | str | None = None,
        fields: Mapping[str, str] | str | None = None,
        all_namespaces: bool = False,
    ) -> Objects:
        """Return the objects with these labels and fields, each with its `apiVersion` and `kind`."""
        found = resource(kind)
        params = {"labelSelector": selector(labels), "fieldSelector": selector(fields), "limit": str(_PAGE)}
        items: Objects = []
        while True:
            page = self._ask("GET", "list", found, params=params, namespace="" if all_namespaces else self.namespace)
            # A list leaves out of its items what it says itself.
            items += ({"apiVersion": found.api_version, "kind": found.kind} | item for item in page["items"])
            params["continue"] = page["metadata"].get("continue", "")
            if not params["continue"]:
                return items

    def pods_of(self, job: Object) -> Objects:
        """Return a Job's pods, oldest first."""
        pods = self.list("Pod", labels={"job-name": job["metadata"]["name"]})
        uid = job["metadata"]["uid"]
        owned = [pod for pod in pods if any(ref["uid"] == uid for ref in pod["metadata"].get("ownerReferences", []))]
        return sorted(owned, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def delete_labelled(
        self,
        kind: str,
        labels: Mapping[str, str],
        *,
        grace_seconds: int | None = None,
        propagation: Propagation = "Background",
    ) -> Names:
        """Delete the objects with these labels, each as it was when listed; return the names of those that were there.

        Raises:
            InputError: no label is given: that would be all of them.
        """
        if not labels:
            raise InputError("which objects to delete is not said: no labels", code="invalid-object")
        gone = []
        for item in self.list(kind, labels=labels):
            meta = item["metadata"]
            if self.delete(kind, meta["name"], grace_seconds=grace_seconds, propagation=propagation, uid=meta["uid"]):
                gone.append(meta["name"])
        return gone

    def watch(
        self,
        kind: str,
        *,
        name: str = "",
        labels: Mapping[str, str] | str | None = None,
        fields: Mapping[str, str] | str | None = None,
        all_namespaces: bool = False,
        timeout_seconds: float | None = None,
        tell_absent: bool = False,
    ) -> Iterator[WatchEvent]:
        """Yield what is there as `ADDED`, then each change as `ADDED`, `MODIFIED` or `DELETED`, until the timeout.

        It goes on over broken connections and an API server that is away, and yields no change twice. With
        `tell_absent`, one `ABSENT` with an empty object is yielded first when nothing is there.
        """
        return watch(
            self.connection,
            resource(kind),
            "" if all_namespaces else self.namespace,
            labels=selector(labels),
            fields=",".join(part for part in (f"metadata.name={name}" if name else "", selector(fields)) if part),
            timeout_seconds=timeout_seconds,
            tell_absent=tell_absent,
        )

    # --- logs ---------------------------------------------------------------------------------------------------------

    def follow_logs(
        self,
        pod: str,
        container: str = "",
        *,
        on_line: Callable[[LogLine], None],
        since: str = "",
    ) -> None:
        """Hand each line of a container's log to `on_line`, once, until the container has ended or the pod is gone.

        It waits for the container to start, and goes on over broken connections. `since` is the time of the last
        line that an earlier call handed over: lines are handed over from the next one on.
        """
        follow(self, pod, container, on_line=on_line, since=since)

    def read_logs(self, pod: str, container: str = "", *, tail: int = 20, previous: bool = False) -> str:
        """Return the last lines of a container's log, or of its last run before a restart; empty if there is none."""
        return read(self, pod, container, tail=tail, previous=previous)

    # --- the API server -----------------------------------------------------------------------------------------------

    def served(self, kind: str) -> Names:
        """Return the API versions in which the cluster serves a kind of a custom resource, the preferred one first."""
        return served(self.connection, resource(kind))

    def server_time(self) -> datetime:
        """Return the time by the API server's clock, to the second, in UTC."""
        return server_time(self.connection)

    # --- events, rights, services ------------------------------------------------------------------------------------

    def events(self, target: Object) -> Objects:
        """Return the Events about an object, newest last."""
        return events_of(self, target)

    def record_event(self, target: Object, reason: str, message: str, type: EventType = "Normal") -> None:
        """Add an Event to an object for `kubectl describe`; the same one again is counted, not repeated.

        Never raises for what the cluster does: an Event that is not taken is logged.
        """
        record(self, target, reason, message, type)

    def can_i(self, verb: str, resource: str, group: str = "", namespace: str | None = None) -> bool:
        """Whether the caller may do this to `pods`, `pods/log` or, with the group `batch`, `jobs`."""
        return may(self, Right(verb, resource, group), self.namespace if namespace is None else namespace)

    def missing_rights(self, rights: Sequence[Right]) -> Rights:
        """Return those of the rights that the caller does not have in the namespace; one request if all are there."""
        return missing(self, rights)

    def service_url(self, name: str, port: int | str = 80) -> str:
        """Return where a Service answers: its DNS name in the cluster, the API server's proxy from outside."""
        if self.connection.in_cluster:
            return f"http://{name}.{self.namespace}.svc:{port}"
        path = resource("Service").path(self.namespace, f"{name}:{port}").replace("%3A", ":")
        return f"{self.connection.server.rstrip('/')}{path}/proxy"

    def service_client(self, name: str, port: int | str = 80, *, timeout_seconds: float = 60.0) -> httpx.Client:
        """Return a client whose base is the Service's URL, with the caller's login where the API server stands between.

        Close it after use. What it raises are httpx's own errors.
        """
        return self.connection.client(self.service_url(name, port), timeout_seconds)

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def _apply(self, manifest: Mapping[str, Any], subresource: str, manager: str, force: bool) -> Object:
        body = copy.deepcopy(dict(manifest))
        body["metadata"].pop("managedFields", None)
        return self._ask(
            "PATCH",
            "patch",
            resource_of(body),
            body["metadata"]["name"],
            subresource,
            body=body,
            namespace=body["metadata"].get("namespace"),
            content_type="application/apply-patch+yaml",
            params={"fieldManager": manager, "force": "true" if force else "false"},
        )

    def _ask(
        self,
        method: str,
        verb: str,
        found: Resource,
        name: str = "",
        subresource: str = "",
        *,
        namespace: str | None = None,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        namespace = self.namespace if namespace is None else namespace
        shown = name or str((body or {}).get("metadata", {}).get("name", ""))
        request = Request(verb, found, namespace, shown, subresource)
        return self.connection.request(
            request,
            method,
            found.path(namespace, name, subresource),
            params={key: value for key, value in (params or {}).items() if value},
            body=body,
            content_type=content_type,
        )
