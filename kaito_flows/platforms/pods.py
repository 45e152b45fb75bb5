"""What is asked of Kubernetes for a job and for a service: manifests, made of a spec and of the settings alone.

    /mnt/config          ConfigMap: job.json, weights.json, training_config.yaml
    /workspace/weights   the base model, brought by the init container `weights`
    /mnt/data, /mnt/results, /tmp, /dev/shm    room that goes with the pod
    /var/run/secrets/kaito-flows/registry/<secret>/    Secrets, as files

Pods satisfy the Pod Security Standard "restricted": not root, a read-only root file system, no privilege, no
capability, the runtime's seccomp profile; they have no token for the API server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from kaito_flows.canonical import canonical_digest
from kaito_flows.cluster.labels import labels, object_name
from kaito_flows.platforms.base import JobSpec, ServiceSpec, Weights
from kaito_flows.settings import Settings

Manifest = dict[str, Any]

PORT = 5000
RENDEZVOUS_PORT = 29500
USER = 10001
GRACE_SECONDS = 120
"""How long a pod has after SIGTERM: to finish a step, and to push a checkpoint."""
DRAIN_SECONDS, CONNECTIONS_SECONDS = 60, 5
"""How long a server has after SIGTERM to finish its answers, and how long before it the Service stops leading to it."""
JOB_LABEL, RANK_LABEL, REVISION_LABEL = "kaito-flows/job", "kaito-flows/rank", "kaito-flows/revision"
TEMPLATE_LABEL = "kaito-flows/template"
"""On pods of a Workspace's own template, which our network policies leave alone."""
CONFIG = "/mnt/config"
STORE = "/workspace-store"
REGISTRY_SECRETS = "/var/run/secrets/kaito-flows/registry"
HUB_SECRET = "/var/run/secrets/kaito-flows/huggingface"

_SMALL: Manifest = {"requests": {"cpu": "10m", "memory": "32Mi"}}

# What GPU nodes are kept free with: KAITO's taint, NVIDIA's, and Azure's for spot nodes.
_TOLERATIONS: list[Manifest] = [
    {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    # A node that is away for a minute is given up; Kubernetes would wait for five.
    {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
    {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60},
]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom everything belongs to: the Workspace's object, and the run that asks."""

    api_version: str
    name: str
    uid: str
    run_id: str

    def labels(self, component: str) -> dict[str, str]:
        """The labels of what is made for it."""
        return labels(self.name, component, self.run_id)

    def metadata(self, name: str, component: str) -> Manifest:
        """The metadata of an object that goes when the Workspace goes."""
        reference = {"apiVersion": self.api_version, "kind": "Workspace", "name": self.name, "uid": self.uid}
        return {"name": name, "labels": self.labels(component), "ownerReferences": [reference]}


def job_names(spec: JobSpec) -> list[str]:
    """The names of the Jobs of a spec: one, or one for each of its nodes."""
    name = object_name(spec.name)
    if spec.placement.count == 1:
        return [name]
    return [object_name(spec.name, str(rank)) for rank in range(spec.placement.count)]


def config_map(spec: JobSpec, owner: Owner, settings: Settings, job: Mapping[str, Any]) -> Manifest:
    """The ConfigMap that a job's or a service's pods read: their job files and the texts of `spec.files`."""
    cached = bool(settings.weights_cache)
    data = {"job.json": json.dumps(job, indent=1, sort_keys=True)}
    for path, text in spec.files.items():
        data[PurePosixPath(path).name] = text
    if spec.weights is not None:
        weights: Manifest = {"version": 1, "root": "/", "source": dict(spec.weights.source)}
        # On one file system with the model, a download becomes part of it without a copy.
        weights |= {"cache": f"{STORE}/cache", "store": STORE} if cached else {"cache": "/workspace/cache"}
        data["weights.json"] = json.dumps(weights, indent=1, sort_keys=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": owner.metadata(object_name(spec.name), spec.program),
        "data": data,
    }


def jobs(spec: JobSpec, owner: Owner, settings: Settings, arguments: Mapping[str, Any]) -> list[Manifest]:
    """The Jobs of a spec: one, or one for each node (Indexed Jobs would ask for Kubernetes 1.24)."""
    deadline = int(max(settings.job_deadline_hours * 3600, 4 * (spec.expected_seconds or 0)))
    found = []
    for rank, name in enumerate(job_names(spec)):
        own = {JOB_LABEL: object_name(spec.name), RANK_LABEL: str(rank)}
        metadata = owner.metadata(name, spec.program)
        metadata["labels"] |= own
        pod = _pod(spec, settings, settings.tuner_image, spec.placement.gpus)
        pod["restartPolicy"] = "Never"
        pod["terminationGracePeriodSeconds"] = GRACE_SECONDS
        main = pod["containers"][0]
        main["env"] += [{"name": "KAITO_FLOWS_NODE_RANK", "value": str(rank)}]
        if spec.placement.count > 1:
            main["ports"] = [{"name": "torch", "containerPort": RENDEZVOUS_PORT, "protocol": "TCP"}]
            pod["affinity"]["podAntiAffinity"] = _apart({JOB_LABEL: own[JOB_LABEL]})
            # PyTorch numbers machines in the order of their names, and pod 0 is the one that is listened to.
            pod["hostname"] = f"node-{rank}"
        found.append(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": metadata,
                "spec": {
                    # An evicted or preempted pod comes again and goes on from its checkpoint. Faults of the input are
                    # final: newer API servers end the Job for them by themselves, and the run does it in any case.
                    "backoffLimit": 6,
                    "podFailurePolicy": {
                        "rules": [
                            {
                                "action": "Ignore",
                                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                            },
                            {
                                "action": "FailJob",
                                "onExitCodes": {
                                    "containerName": spec.program,
                                    "operator": "In",
                                    "values": list(FINAL_EXIT_CODES),
                                },
                            },
                        ]
                    },
                    "activeDeadlineSeconds": deadline,
                    "ttlSecondsAfterFinished": settings.job_kept_seconds,
                    "template": {
                        "metadata": {"labels": {**owner.labels(spec.program), **own}},
                        "spec": pod,
                    },
                },
            }
        )
    return found


def warm_job(spec: JobSpec, owner: Owner, settings: Settings) -> Manifest:
    """A Job that lets a new node get what the tuning pod will need, while its data is not there yet.

    One pod on each node: it brings the weights, where nodes keep them, by a small image that is there at once, and
    meanwhile the kubelet pulls the large one. It asks for no GPU.
    """
    pod = _pod(spec, settings, settings.tuner_image, 0)
    image = pod["containers"][0]
    image |= {"name": "image", "command": ["python", "-c", "pass"], "resources": _SMALL}
    brings = pod.pop("initContainers", [])
    if settings.weights_cache:
        # Containers are started in their order, each when its image is there.
        pod["containers"] = [*({**one, "image": settings.worker_image} for one in brings), image]
    name, count = object_name(spec.name), len(spec.placement.nodes)
    own = {JOB_LABEL: name}
    pod |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
    pod["affinity"] = {**pod["affinity"], "podAntiAffinity": _apart(own)}
    metadata = owner.metadata(name, spec.program)
    metadata["labels"] |= own
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completions": count,
            "parallelism": count,
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": 60,
            "template": {"metadata": {"labels": {**owner.labels(spec.program), **own}}, "spec": pod},
        },
    }


FINAL_EXIT_CODES = (2, 10, 11, 12, 13, 14, 16, 17, 19)
"""Exit codes after which the same job would fail in the same way again (see `kaito_flows.errors`)."""


def rendezvous(spec: JobSpec) -> str | None:
    """Where the pods of a job with several nodes meet; None for one pod."""
    return f"{object_name(spec.name)}:{RENDEZVOUS_PORT}" if spec.placement.count > 1 else None


def rendezvous_service(spec: JobSpec, owner: Owner) -> Manifest:
    """The headless Service by which the pods of a job with several nodes find the first."""
    name = object_name(spec.name)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": owner.metadata(name, spec.program),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: name, RANK_LABEL: "0"},
            "ports": [{"name": "torch", "port": RENDEZVOUS_PORT, "protocol": "TCP"}],
        },
    }


def deployment(spec: ServiceSpec, owner: Owner, settings: Settings, name: str) -> Manifest:
    """The Deployment of one revision of a service: of our server, or of the pod template that the Workspace brings."""
    own = {REVISION_LABEL: spec.revision}
    pod = _serving_pod(spec, settings) if spec.template is None else _own_pod(spec.template, spec.job.placement.nodes)
    theirs = dict((spec.template or {}).get("metadata", {}).get("labels", {}))
    if spec.template is not None:
        theirs[TEMPLATE_LABEL] = "true"
    metadata = owner.metadata(name, "server")
    metadata["labels"] |= own
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "progressDeadlineSeconds": startup_seconds(spec.job.weights) + 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": {**_selector(owner), **own}},
            "template": {
                "metadata": {"labels": {**theirs, **owner.labels("server"), **_selector(owner), **own}},
                "spec": pod,
            },
        },
    }


def startup_seconds(weights: Weights | None) -> int:
    """How long a server may take to come up: KAITO's 15 minutes and 18 seconds a GiB, and at least half an hour."""
    return max(900 + 18 * (weights.bytes if weights else 0) // 2**30, 1800)


def container_of(spec: ServiceSpec) -> str:
    """The name of the container that serves."""
    return spec.job.program if spec.template is None else str(spec.template["spec"]["containers"][0]["name"])


def _serving_pod(spec: ServiceSpec, settings: Settings) -> Manifest:
    pod = _pod(spec.job, settings, settings.server_image, spec.job.placement.gpus)
    pod["terminationGracePeriodSeconds"] = CONNECTIONS_SECONDS + DRAIN_SECONDS + 5
    main = pod["containers"][0]
    main["ports"] = [{"name": "http", "containerPort": PORT, "protocol": "TCP"}]
    health = {"httpGet": {"path": "/health", "port": "http"}}
    tries = startup_seconds(spec.job.weights) // 2
    main["startupProbe"] = {**health, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": tries}
    main["readinessProbe"] = {**health, "periodSeconds": 5, "timeoutSeconds": 10, "failureThreshold": 3}
    main["livenessProbe"] = {**health, "periodSeconds": 10, "timeoutSeconds": 20, "failureThreshold": 6}
    # Kubernetes takes the pod out of the Service and stops it at the same time: the one must be known before the other.
    wait = f"import time; time.sleep({CONNECTIONS_SECONDS})"
    main["lifecycle"] = {"preStop": {"exec": {"command": ["python", "-c", wait]}}}
    return pod


def _own_pod(template: Mapping[str, Any], nodes: tuple[str, ...]) -> Manifest:
    pod: Manifest = json.loads(json.dumps(template.get("spec", {})))
    pod.setdefault("tolerations", _TOLERATIONS)
    pod.setdefault("affinity", _on(nodes))
    return pod


def service(name: str, owner: Owner, spec: ServiceSpec) -> Manifest:
    """A Service that leads to the pods of one revision: 80 to the server, 29500 for torch, as KAITO has it."""
    ports = (spec.template or {}).get("spec", {}).get("containers", [{}])[0].get("ports", [])
    target = ports[0]["containerPort"] if ports else PORT
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": owner.metadata(name, "server"),
        "spec": {
            "type": "LoadBalancer" if spec.public else "ClusterIP",
            "selector": {**_selector(owner), REVISION_LABEL: spec.revision},
            "ports": [
                {"name": "http", "port": 80, "targetPort": target, "protocol": "TCP"},
                {"name": "torch", "port": RENDEZVOUS_PORT, "targetPort": RENDEZVOUS_PORT, "protocol": "TCP"},
            ],
        },
    }


def _selector(owner: Owner) -> dict[str, str]:
    of = owner.labels("server")
    return {key: of[key] for key in ("app.kubernetes.io/instance", "app.kubernetes.io/component")}


def placed(manifest: Manifest) -> tuple[str, ...]:
    """The nodes that a Job or Deployment is pinned to."""
    spec = manifest["spec"]["template"]["spec"]
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ()):
        for expression in term.get("matchExpressions", ()):
            if expression["key"] == "kubernetes.io/hostname":
                return tuple(expression["values"])
    return ()


def without_placement(manifest: Manifest) -> Manifest:
    """The manifest without what says where it runs and for which run: two that agree in the rest do the same work."""
    copy: Manifest = json.loads(json.dumps(manifest))
    copy["spec"]["template"]["spec"].pop("affinity", None)
    for metadata in (copy["metadata"], copy["spec"]["template"]["metadata"]):
        metadata["labels"] = {k: v for k, v in metadata["labels"].items() if k != "kaito-flows/run-id"}
    return copy


def digest_of_work(manifest: Manifest, config: Manifest) -> str:
    """The digest of what a Job does, with its ConfigMap: whatever was thought of the time and the memory it takes."""
    job = without_placement(manifest)
    del job["spec"]["activeDeadlineSeconds"]
    told = {key: value for key, value in json.loads(config["data"]["job.json"]).items() if key != "memory"}
    return canonical_digest({"job": job, "config": {**config["data"], "job.json": told}})


def _pod(spec: JobSpec, settings: Settings, image: str, gpus: int) -> Manifest:
    environment = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    if settings.insecure_registries:
        environment.append({"name": "KAITO_FLOWS_INSECURE_REGISTRIES", "value": settings.insecure_registries})
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": object_name(spec.name)}},
        {"name": "room", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
        *({"name": "room", "mountPath": f"/{path}", "subPath": path} for path in ("tmp", "mnt/data", "mnt/results")),
        {"name": "room", "mountPath": "/mnt/adapter", "subPath": "mnt/adapter"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    for i, secret in enumerate(dict.fromkeys(spec.secrets)):
        volumes.append({"name": f"registry-{i}", "secret": {"secretName": secret, "defaultMode": 0o440}})
        mounts.append({"name": f"registry-{i}", "mountPath": f"{REGISTRY_SECRETS}/{secret}", "readOnly": True})
    for i, (path, source) in enumerate(sorted(spec.volumes.items())):
        volumes.append({"name": f"volume-{i}", **source})
        mounts.append({"name": f"volume-{i}", "mountPath": path, "readOnly": not spec.writes_volumes})
    memory = settings.job_memory or f"{_memory(spec.weights) // 2**20}Mi"
    resources: Manifest = {"requests": {"cpu": settings.job_cpu, "memory": memory}}
    if gpus:
        resources["requests"]["nvidia.com/gpu"] = str(gpus)
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
        environment.append({"name": "PYTORCH_CUDA_ALLOC_CONF", "value": "expandable_segments:True"})
    main: Manifest = {
        "name": spec.program,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", f"kaito_flows.containers.{spec.program}", f"{CONFIG}/job.json"],
        "env": environment,
        "resources": resources,
        "volumeMounts": mounts,
        "securityContext": _locked_down(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    pod: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # The first process of a namespace does not hear a SIGTERM that it has no handler for yet.
        "shareProcessNamespace": True,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "tolerations": _TOLERATIONS,
        "affinity": _on(spec.placement.nodes),
        "containers": [main],
        "volumes": volumes,
    }
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name.strip()} for name in settings.image_pull_secrets.split(",")]
    if spec.weights is not None:
        _bring_weights(pod, main, spec.weights, settings, image, spec.secrets)
    return pod


def _bring_weights(
    pod: Manifest, main: Manifest, weights: Weights, settings: Settings, image: str, secrets: tuple[str, ...]
) -> None:
    pod["volumes"].append({"name": "workspace", "emptyDir": {}})
    main["volumeMounts"] = [*main["volumeMounts"], {"name": "workspace", "mountPath": "/workspace"}]
    kind, _, where = settings.weights_cache.partition(":")
    if kind:
        source = {"hostPath": {"path": where}} if kind == "node" else {"persistentVolumeClaim": {"claimName": where}}
        pod["volumes"].append({"name": "store", **source})
        main["volumeMounts"].append({"name": "store", "mountPath": STORE})
    init: Manifest = {
        **{key: main[key] for key in ("image", "imagePullPolicy", "securityContext", "terminationMessagePolicy")},
        "name": "weights",
        "command": ["python", "-m", "kaito_flows.containers.weights", f"{CONFIG}/weights.json"],
        "env": list(main["env"]),
        "resources": {"requests": {"cpu": settings.job_cpu, "memory": main["resources"]["requests"]["memory"]}},
        "volumeMounts": list(main["volumeMounts"]),
    }
    for i, name in enumerate(sorted(set(weights.pull_secrets) - set(secrets))):
        pod["volumes"].append({"name": f"pull-{i}", "secret": {"secretName": name, "defaultMode": 0o440}})
        init["volumeMounts"].append({"name": f"pull-{i}", "mountPath": f"{REGISTRY_SECRETS}/{name}", "readOnly": True})
    if weights.secret:
        items = [{"key": "HF_TOKEN", "path": "HF_TOKEN"}]
        secret = {"secretName": weights.secret, "items": items, "defaultMode": 0o440}
        pod["volumes"].append({"name": "huggingface", "secret": secret})
        init["volumeMounts"].append({"name": "huggingface", "mountPath": HUB_SECRET, "readOnly": True})
    pod["initContainers"] = [init]


def _memory(weights: Weights | None) -> int:
    """Host memory for the program, its libraries, and the weights on their way to the GPU."""
    return 2 * 2**30 + int(1.2 * (weights.bytes if weights else 0))


def _on(nodes: tuple[str, ...]) -> Manifest:
    if not nodes:
        return {}
    expression = {"key": "kubernetes.io/hostname", "operator": "In", "values": list(nodes)}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _apart(matching: Mapping[str, str]) -> Manifest:
    """A node for each pod, where there are as many."""
    term = {"labelSelector": {"matchLabels": dict(matching)}, "topologyKey": "kubernetes.io/hostname"}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}


def _locked_down() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
