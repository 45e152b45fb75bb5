"""A Kubernetes namespace as a platform: jobs are Jobs, services are Deployments, all of it belongs to the Workspace.

What is made has the Workspace's object as its owner, so that the API server removes it with the Workspace, and a name
computed from what it is for, so that every call finds what an earlier one made.
"""

from __future__ import annotations

import base64
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx

from kaito_flows.canonical import canonical_digest
from kaito_flows.cluster.gateway import Cluster, Propagation
from kaito_flows.cluster.labels import RUN_ID, object_name, selector
from kaito_flows.errors import ClusterError, InputError, KaitoFlowsError, RunError, disk_errors
from kaito_flows.oci.credentials import Credentials, merged_dockerconfigs
from kaito_flows.oci.registry import RegistryRepository
from kaito_flows.oci.repository import Repository
from kaito_flows.platforms import pods
from kaito_flows.platforms.base import Event, JobSpec, Placement, Service, ServiceSpec, Weights
from kaito_flows.platforms.following import JobFollower, ready_hosts
from kaito_flows.platforms.local import LocalPlatform
from kaito_flows.platforms.outputs import check_output
from kaito_flows.platforms.rollout import RollOut
from kaito_flows.reference import Reference
from kaito_flows.settings import Settings
from kaito_flows.workspace import Workspace
from kaito_flows.workspace.spec import GUEST_ANNOTATION
from kaito_flows.workspace.status import WorkspaceStatus, status_of_resource, status_resource

Object = dict[str, Any]

SUSPEND_ANNOTATION = "kaito-flows/suspend"
GONE_SECONDS = 25.0
SECRET_SECONDS = 15.0
"""How long a Secret that was read counts as new: the steps before a training each ask for the same ones."""
DELETE_GRACE_SECONDS = 1
# What the cluster says of itself: the job goes on, whatever its follower can see or may do.
_BLIND = frozenset({"access-denied", "admission-refused", "cluster-not-trusted", "not-logged-in"})
_OWNED = ("Job", "Deployment", "Service", "ConfigMap")


class KubernetesPlatform:
    """Runs jobs and services as pods of one namespace; see `Platform` for what each method promises."""

    kind: Literal["local", "kubernetes"] = "kubernetes"

    def __init__(
        self, settings: Settings, *, namespace: str = "", run_id: str = "", cluster: Cluster | None = None
    ) -> None:
        self.settings = settings
        self.cluster = cluster or Cluster.connect(namespace or None)
        self._secrets: dict[str, tuple[float, dict[str, bytes]]] = {}
        self._run_id = run_id
        self._owner: pods.Owner | None = None
        self._generation = 1
        self._made: dict[tuple[str, str], str] = {}

    @property
    def namespace(self) -> str:
        """The Workspace's, or what the settings or the kubeconfig say."""
        return self.cluster.namespace

    # --- the Workspace ------------------------------------------------------------------------------------------------

    def begin(self, workspace: Workspace) -> None:
        """Find the Workspace's object, or make it where a run was started without `kubectl apply`.

        One that is made here is marked as suspended, so that the watcher leaves it to this run.

        Raises:
            RunError: (codes `workspace-deleted`, `workspace-changed`) it is not what this run was started for.
            InputError: (code `workspace-differs`) another Workspace has this name.
        """
        wanted = workspace.model_dump(mode="json", by_alias=True, exclude_unset=True)
        asked_for = workspace.metadata
        uid = (asked_for.model_extra or {}).get("uid")
        found = self.cluster.get("Workspace", workspace.name)
        if found is None or found["metadata"].get("deletionTimestamp"):
            if uid is not None or found is not None:
                raise _deleted(workspace.name)
            annotations = {**asked_for.annotations, SUSPEND_ANNOTATION: "true"}
            metadata = {"name": workspace.name, "labels": asked_for.labels, "annotations": annotations}
            body = {key: value for key, value in wanted.items() if key in ("resource", "tuning", "inference")}
            found = self.cluster.create(
                {"apiVersion": workspace.api_version, "kind": "Workspace", "metadata": metadata, **body}
            )
        elif uid is not None:
            if found["metadata"]["uid"] != uid:
                raise _deleted(workspace.name)
            if found["metadata"]["generation"] != (asked_for.generation or found["metadata"]["generation"]):
                raise _changed(workspace.name)
        elif not _same_workspace(found, workspace) or _guest_of(found) != workspace.guest_of:
            hint = f"kubectl apply the new one, or delete the old: kubectl delete workspace {workspace.name}"
            place = f"Workspace {self.cluster.namespace}/{workspace.name}"
            raise InputError("another one of this name is there", place=place, hint=hint, code="workspace-differs")
        metadata = found["metadata"]
        self._generation = metadata["generation"]
        self._owner = pods.Owner(workspace.api_version, workspace.name, metadata["uid"], self._run_id)

    def check_known(self, workspace: str) -> None:
        """Raise if the Workspace was deleted or changed.

        Raises:
            RunError: (codes `workspace-deleted`, `workspace-changed`).
        """
        found = self.cluster.get("Workspace", workspace)
        owner = self._known_owner(workspace)
        if found is None or found["metadata"].get("deletionTimestamp") or found["metadata"]["uid"] != owner.uid:
            raise _deleted(workspace)
        if found["metadata"]["generation"] != self._generation:
            raise _changed(workspace)

    def read_status(self, workspace: str) -> WorkspaceStatus | None:
        """What the Workspace's object says."""
        found = self.cluster.get("Workspace", workspace)
        return None if found is None else status_of_resource(found)

    def statuses(self) -> list[WorkspaceStatus]:
        """What every Workspace's object of the namespace says, by name."""
        found = sorted(self.cluster.list("Workspace"), key=lambda item: str(item["metadata"]["name"]))
        return [status_of_resource(item) for item in found]

    def watch_statuses(self, workspace: str = "") -> Iterator[WorkspaceStatus]:
        """Yield the status of one workspace or of all, and then again whenever one changes, without an end."""
        for kind, found in self.cluster.watch("Workspace", name=workspace):
            if kind != "DELETED":
                yield status_of_resource(found)

    def write_status(self, status: WorkspaceStatus) -> None:
        """Write the status into the Workspace's object; one that is gone, or no longer the run's own, is left alone."""
        owner = self._known_owner(status.name)
        found = (self.cluster.get("Workspace", status.name) or {}).get("metadata", {})
        # Not every API server heeds the UID that an apply names.
        if (found.get("uid"), found.get("generation")) != (owner.uid, self._generation):
            return
        metadata = {"name": status.name, "uid": owner.uid}
        body = {"apiVersion": owner.api_version, "kind": "Workspace", "metadata": metadata}
        self.cluster.apply_status({**body, "status": status_resource(status)})

    def record(self, workspace: str, reason: str, message: str, *, warning: bool = False) -> None:
        """Record a Kubernetes Event of the Workspace's object."""
        owner = self._known_owner(workspace)
        metadata = {"name": workspace, "namespace": self.cluster.namespace, "uid": owner.uid}
        about = {"apiVersion": owner.api_version, "kind": "Workspace", "metadata": metadata}
        self.cluster.record_event(about, reason, message, "Warning" if warning else "Normal")

    def config_text(self, name: str, key: str) -> str | None:
        """Return what the ConfigMap holds under the key.

        Raises:
            InputError: (code `config-map-not-found`) no such ConfigMap, or no such key in it.
        """
        found = self.cluster.get("ConfigMap", name)
        place = f"ConfigMap {self.cluster.namespace}/{name}"
        if found is None:
            hint = f"kubectl -n {self.cluster.namespace} create configmap {name} --from-file={key}"
            raise InputError("there is none of this name", place=place, hint=hint, code="config-map-not-found")
        text = found.get("data", {}).get(key)
        if not isinstance(text, str):
            have = ", ".join(sorted(found.get("data", {}))) or "nothing"
            hint = f"put the text under {key}: kubectl edit configmap {name}"
            message = f"it has no key {key!r}; it has {have}"
            raise InputError(message, place=place, hint=hint, code="config-map-not-found")
        return text

    def check_secrets(self, names: Sequence[str], *, hub: str = "") -> None:
        """See that each Secret is there, and is what it must be.

        Raises:
            InputError: (codes `secret-not-found`, `invalid-secret`).
        """
        for name in dict.fromkeys(names):
            Credentials.from_dockerconfig(*self._dockerconfigs(name))
        if hub and "HF_TOKEN" not in self._secret(hub, "kubectl create secret generic NAME --from-literal=HF_TOKEN=…"):
            hint = "put a token of huggingface.co under HF_TOKEN"
            raise InputError("it has no key HF_TOKEN", place=self._secret_place(hub), hint=hint, code="invalid-secret")

    def repository(self, image: str, secrets: Sequence[str] = ()) -> Repository:
        """Return the repository in its registry; the Secrets are read anew with each call, or were a moment ago.

        Raises:
            ImageError: it is no image reference.
            InputError: (codes `secret-not-found`, `invalid-secret`).
        """
        reference = Reference.parse(image)
        configs = [config for name in dict.fromkeys(secrets) for config in self._dockerconfigs(name)]
        credentials = Credentials.from_dockerconfig(*configs) if secrets else None
        return RegistryRepository(reference.registry, reference.repository, credentials)

    def check_output(self, workspace: str, image: str) -> None:
        """See that the tag is no other Workspace's of this namespace.

        Raises:
            InputError: (code `output-taken`).
        """
        check_output(self.cluster.list("Workspace"), workspace, image)

    def _dockerconfigs(self, name: str) -> list[bytes]:
        hint = "kubectl create secret docker-registry NAME --docker-server=… --docker-username=… --docker-password=…"
        data = self._secret(name, hint)
        found = [data[key] for key in (".dockerconfigjson", ".dockercfg") if key in data]
        if not found:
            place = self._secret_place(name)
            raise InputError("it has no key .dockerconfigjson", place=place, hint=hint, code="invalid-secret")
        return found

    def _secret(self, name: str, hint: str) -> dict[str, bytes]:
        read_at, data = self._secrets.get(name, (-math.inf, {}))
        if time.monotonic() - read_at < SECRET_SECONDS:
            return data
        found = self.cluster.get("Secret", name)
        if found is None:
            place = self._secret_place(name)
            raise InputError("there is none of this name", place=place, hint=hint, code="secret-not-found")
        data = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
        self._secrets[name] = time.monotonic(), data
        return data

    def _secret_place(self, name: str) -> str:
        return f"Secret {self.cluster.namespace}/{name}"

    # --- here, where the run is ---------------------------------------------------------------------------------------

    @property
    def downloads(self) -> Path:
        """Where downloaded data is kept, as long as the run's own machine lasts."""
        return self.settings.folder / "cache" / "downloads"

    def free_bytes(self) -> int:
        """Bytes that are free where the run prepares data."""
        with disk_errors(self.settings.folder):
            self.settings.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.settings.folder).free

    def ensure_weights(self, weights: Weights, on_event: Callable[[Event], None]) -> Path:
        """Return a folder with the model's tokenizer: pods bring the weights themselves.

        Raises:
            WeightsError: the source cannot be had, or is not what the preset says.
        """
        # As in pods, Secrets are files, and never in an environment; these are gone when the tokenizer is there.
        with tempfile.TemporaryDirectory(prefix="kaito-flows-") as folder:
            environment = {}
            if weights.secret:
                environment = {"HF_TOKEN": "", "HF_TOKEN_PATH": f"{folder}/HF_TOKEN"}
                Path(folder, "HF_TOKEN").write_bytes(self._secret(weights.secret, "")["HF_TOKEN"])
            if weights.pull_secrets:
                environment["DOCKER_CONFIG"] = folder
                configs = [config for name in weights.pull_secrets for config in self._dockerconfigs(name)]
                Path(folder, "config.json").write_bytes(merged_dockerconfigs(configs))
            return LocalPlatform(self.settings).ensure_tokenizer(weights, on_event, environment)

    def has_weights(self, weights: Weights) -> bool:
        """Nothing large is written here."""
        return True

    def warm_up(self, workspace: str, nodes: Sequence[str], weights: Weights) -> None:
        """Start a pod on each node that gets what the job will need."""
        owner = self._known_owner(workspace)
        name = f"warm-{workspace}-{canonical_digest(sorted(nodes))[:8]}"
        spec = JobSpec(name, workspace, "warmer", {}, weights=weights, placement=Placement(tuple(nodes)))
        manifest = pods.warm_job(spec, owner, self.settings)
        self.cluster.apply(pods.config_map(spec, owner, self.settings, {}))
        self.cluster.ensure(manifest, digest=canonical_digest(manifest))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def run_job(self, spec: JobSpec, on_event: Callable[[Event], None]) -> Event:
        """Run the job to its end, or follow the one that is there; return its `completed` event.

        A job that was made from the same spec is adopted, wherever it was placed, unless its nodes are gone: then it is
        made anew on those of the spec. Other jobs of the same program that the Workspace has are replaced by it.

        Raises:
            KaitoFlowsError: what became of it; a job that cannot succeed any more is removed.
        """
        owner = self._known_owner(spec.workspace)
        self._remove_others(spec, owner)
        arguments = spec.job_file("/")
        if spec.placement.count > 1 or spec.placement.gpus > 1:
            arguments["world"] = {
                "nodes": spec.placement.count,
                "processes": max(spec.placement.gpus, 1),
                "rendezvous": pods.rendezvous(spec),
            }
        config = pods.config_map(spec, owner, self.settings, arguments)
        self._remember(self.cluster.apply(config))
        if spec.placement.count > 1:
            self._remember(self.cluster.apply(pods.rendezvous_service(spec, owner)))
        for manifest in pods.jobs(spec, owner, self.settings, arguments):
            digest = pods.digest_of_work(manifest, config)
            found = self.cluster.ensure(manifest, digest=digest)
            job = self._adopt(found.object, manifest, digest) if found.outcome == "adopted" else found.object
            self._remember(job)
        follower = JobFollower(
            self.cluster,
            object_name(spec.name),
            {name: self._made["Job", name] for name in pods.job_names(spec)},
            spec.program,
            on_event,
            pending_seconds=self.settings.pending_seconds,
        )
        try:
            return follower.follow(lambda: self.check_known(spec.workspace))
        except KaitoFlowsError as exc:
            if not isinstance(exc, ClusterError) and exc.code not in _BLIND:
                self.forget_job(spec)
            raise

    def _remember(self, made: Object) -> None:
        """Know an object again: what gets its name later, from a newer run, is not this run's to remove."""
        self._made[made["kind"], made["metadata"]["name"]] = made["metadata"]["uid"]

    def _adopt(self, found: Object, manifest: Object, digest: str) -> Object:
        """Take over a job that another run has made; make it anew where its nodes are gone."""
        pinned, name = set(pods.placed(found)), found["metadata"]["name"]
        if pinned and not _ended(found) and pinned.isdisjoint(ready_hosts(self.cluster)):
            # Its pods cannot say that they are gone: nobody waits for them.
            self.cluster.delete("Job", name, uid=found["metadata"]["uid"])
            self.cluster.wait_gone("Job", name, uid=found["metadata"]["uid"])
            return self.cluster.ensure(manifest, digest=digest).object
        if self._run_id and found["metadata"].get("labels", {}).get(RUN_ID) != self._run_id:
            self.cluster.patch("Job", name, {"metadata": {"labels": {RUN_ID: self._run_id}}})
        return found

    def _remove_others(self, spec: JobSpec, owner: pods.Owner) -> None:
        own = set(pods.job_names(spec))
        for job in self.cluster.list("Job", labels=selector(owner.name, spec.program)):
            if job["metadata"]["name"] not in own:
                self._remove(job)

    def _remove(self, job: Object) -> None:
        """Delete a Job that was listed, and what was made for it."""
        meta = job["metadata"]
        name = meta.get("labels", {}).get(pods.JOB_LABEL, meta["name"])
        self.cluster.delete("Job", meta["name"], uid=meta["uid"])
        self.cluster.delete("ConfigMap", name)
        if name != meta["name"]:
            self.cluster.delete("Service", name)

    def forget_job(self, spec: JobSpec) -> None:
        """Remove the job, its pods and its ConfigMap; what it published stays, and so does what another run made."""
        name = object_name(spec.name)
        made = [*(("Job", job) for job in pods.job_names(spec)), ("ConfigMap", name)]
        if spec.placement.count > 1:
            made.append(("Service", name))
        for one in made:
            self.cluster.delete(*one, uid=self._made.get(one))

    def stop_jobs(self, workspace: str) -> list[str]:
        """Stop the Workspace's jobs, or this run's alone where the run has an id; return their names.

        Their pods have the time to save a checkpoint.
        """
        found = self.cluster.list("Job", labels=selector(workspace, run_id=self._run_id))
        for job in found:
            self._remove(job)
        return [job["metadata"]["name"] for job in found]

    # --- services -----------------------------------------------------------------------------------------------------

    def check_service(self, workspace: str, port: int | None) -> None:
        """Every Service has an address of its own, so no port can be taken.

        Raises:
            InputError: (code `invalid-setting`) a port is named all the same.
        """
        if port is not None:
            hint = "leave it out: the Service listens on port 80"
            raise InputError("a port can be named on one machine only", place="port", hint=hint, code="invalid-setting")

    def ensure_service(
        self,
        spec: ServiceSpec,
        probe: Callable[[Service, httpx.Client], None],
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Service:
        """Bring a Deployment of the revision up and hand it to `probe`; then let the Service lead to it.

        Raises:
            ServiceError: it did not come up; and what became of its pod.
        """
        owner = self._known_owner(spec.job.workspace)
        return RollOut(self.cluster, self.settings, owner, spec).run(probe, on_event)

    def serves(self, spec: ServiceSpec) -> bool:
        """Whether that very revision is up, wherever."""
        return RollOut(self.cluster, self.settings, self._known_owner(spec.job.workspace), spec).is_up()

    def service(self, workspace: str) -> Service | None:
        """The Workspace's service, if its pods are ready."""
        return RollOut.current(self.cluster, workspace)

    def client(self, service: Service) -> httpx.Client:
        """An HTTP client for the service: by its name in the cluster, through the API server from outside."""
        return self.cluster.service_client(object_name(service.workspace), 80)

    # --- the end ------------------------------------------------------------------------------------------------------

    def delete(self, workspace: str) -> list[str]:
        """Stop everything of the Workspace, and delete its object, if it is still there; return what was stopped.

        Nothing has time to save anything: nobody will ask for it.

        Raises:
            ClusterError: (code `deletion-stuck`) something is not gone after half a minute.
        """
        found = selector(workspace)
        stopped = [
            f"{kind.lower()} {item['metadata']['name']}"
            for kind in ("Job", "Deployment")
            for item in self.cluster.list(kind, labels=found)
        ]
        # First of all: a run that finds its job gone must not make it anew.
        self.cluster.delete("Workspace", workspace)
        for kind in _OWNED:
            # A Job's pods would have two minutes for a checkpoint that nobody wants: they are deleted on their own.
            propagation: Propagation = "Orphan" if kind == "Job" else "Background"
            self.cluster.delete_labelled(kind, found, propagation=propagation)
        self._end_pods(workspace, found)
        return stopped

    def _end_pods(self, workspace: str, labels: Mapping[str, str]) -> None:
        """Delete pods, those too that a controller makes anew before it is gone itself, and wait until none is left."""
        left: set[str] = set()
        ended: set[str] = set()
        for event, pod in self.cluster.watch("Pod", labels=labels, timeout_seconds=GONE_SECONDS, tell_absent=True):
            meta = pod.get("metadata", {})
            uid = meta.get("uid", "")
            if event in ("DELETED", "ABSENT"):
                left.discard(uid)
            else:
                left.add(uid)
                if uid not in ended:
                    ended.add(uid)
                    # Old kubelets take most of a minute to let go of a pod whose image they cannot pull.
                    grace = DELETE_GRACE_SECONDS if _runs(pod) else 0
                    self.cluster.delete("Pod", meta["name"], grace_seconds=grace, uid=uid)
            # An absence is told at once; of a list, every item comes before the first change. What a controller makes
            # after this goes with it.
            if not left:
                return
        hint = "is the node up? kubectl get pods -o wide"
        place = f"Pods of {workspace}"
        raise ClusterError(f"not gone after {GONE_SECONDS:.0f} s", place=place, hint=hint, code="deletion-stuck")

    def _known_owner(self, workspace: str) -> pods.Owner:
        if self._owner is None or self._owner.name != workspace:
            raise RunError("this run has not begun with it", place=workspace, code="workspace-unknown")
        return self._owner


def _ended(job: Object) -> bool:
    return any(c["status"] == "True" for c in job.get("status", {}).get("conditions", ()))


def _runs(pod: Object) -> bool:
    """Whether one of the pod's containers runs, so that there is something to stop."""
    status = pod.get("status", {})
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    return any("running" in one.get("state", {}) for one in containers)


def _same_workspace(found: Object, workspace: Workspace) -> bool:
    """Whether the object says what the Workspace says, defaults written out."""
    document = {key: found[key] for key in ("resource", "tuning", "inference") if key in found}
    again = type(workspace).model_validate({**document, "metadata": {"name": workspace.name}})
    sections = {"resource", "tuning", "inference"}
    return again.model_dump(include=sections) == workspace.model_dump(include=sections)


def _guest_of(found: Object) -> str:
    return str((found["metadata"].get("annotations") or {}).get(GUEST_ANNOTATION, ""))


def _deleted(workspace: str) -> RunError:
    return RunError("was deleted while it ran", place=workspace, hint="apply it again", code="workspace-deleted")


def _changed(workspace: str) -> RunError:
    hint = "the run of the new version goes on"
    return RunError("was changed while it ran", place=workspace, hint=hint, code="workspace-changed")
