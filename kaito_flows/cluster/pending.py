"""What a pod that has not started waits for, and why it may wait in vain."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kaito_flows.cluster.pods import Container, condition_of, containers_of, node_of, pod_place
from kaito_flows.cluster.resources import Object
from kaito_flows.errors import ImagePullError, InputError, JobError, KaitoFlowsError, SchedulingError

_PULL_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
    | {"ImageInspectError"}
)
# What the kubelet tells only after all volumes are there.
_MOUNTED_EVENTS = frozenset({"Pulling", "Pulled", "Created", "Started"})
START_REASONS = frozenset({"CreateContainerError", "RunContainerError", "StartError", "ContainerCannotRun"})
_WRAPPINGS = re.compile(
    r'rpc error: code = \w+ desc = |failed to (?:pull and unpack image|resolve reference) "[^"]*": '
)


def pending_reason(pod: Object, events: Sequence[Object] = ()) -> str:
    """Return what a pod that has not started waits for, in the scheduler's or the kubelet's words; empty if it runs."""
    status = pod.get("status", {})
    if status.get("phase", "Pending") != "Pending":
        return ""
    scheduled = condition_of(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return str(scheduled.get("message") or scheduled.get("reason") or "waits for a node")
    if not pod.get("spec", {}).get("nodeName"):
        return "waits for a node"
    if found := mount_error(pod, events):
        return found.message
    newest: dict[str, str] = {event.get("reason", ""): event.get("message", "") for event in events}
    for item in containers_of(pod):
        waiting = item.state.get("waiting")
        if waiting is None or (not item.first and waiting.get("reason") == "PodInitializing"):
            continue
        if failing := waiting_error(pod, item, events):
            return f"{item.name}: {failing.message}"
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{item.name}: {waiting.get('message') or waiting['reason']}"
        pulling = newest.get("Pulling", "") if "Pulled" not in newest else ""
        return pulling or f"{item.name} is being created on {pod['spec']['nodeName']}"
    return f"waits for {pod['spec']['nodeName']}"


def waiting_error(pod: Object, item: Container, events: Sequence[Object]) -> KaitoFlowsError | None:
    """Return why a container cannot start, as long as that is so; None if it can."""
    waiting = item.state.get("waiting") or {}
    reason, said, place = waiting.get("reason", ""), waiting.get("message") or "", item.place(pod)
    if reason in _PULL_REASONS:
        if reason == "ImagePullBackOff":
            said = _pull_failure(item.image, events) or said
        said = _unwrapped(said) or reason
        return ImagePullError(f"{item.image}: {said}", place=place, hint=_pull_hint(pod, item.image, reason, said))
    if reason == "CreateContainerConfigError":
        return _config_error(said, place)
    if reason in START_REASONS:
        return start_error(said or reason, place)
    return None


def scheduling_error(pod: Object) -> SchedulingError | None:
    """Return why no node takes the pod, in the scheduler's words; None if one does."""
    scheduled = condition_of(pod, "PodScheduled")
    if scheduled.get("status") != "False":
        return None
    said = scheduled.get("message") or "no word from the scheduler"
    text, hint = said.lower(), "look at the cluster's nodes: kubectl get nodes"
    if "nvidia.com/gpu" in text or "insufficient" in text:
        hint = "wait until something else ends, or add nodes that have it"
    elif "persistentvolumeclaim" in text:
        hint = "create the PersistentVolumeClaim in the pod's namespace"
    elif "taint" in text:
        hint = "the nodes are kept for others: tolerate their taint, or take other nodes"
    elif "affinity" in text or "selector" in text:
        hint = "no node has the labels that resource.labelSelector asks for: kubectl get nodes --show-labels"
    return SchedulingError(said, place=pod_place(pod), hint=hint)


def mount_error(pod: Object, events: Sequence[Object]) -> InputError | None:
    """Return the error of a Secret or ConfigMap volume that the kubelet does not find; no status tells of it."""
    if pod["status"].get("phase", "Pending") != "Pending" or not pod.get("spec", {}).get("nodeName"):
        return None
    for event in reversed(events):
        if event.get("reason") in _MOUNTED_EVENTS:
            return None
        if event.get("reason") == "FailedMount":
            said = event.get("message") or ""
            found = re.search(
                r'(secret|configmap) "[^"]*" not found|references non-existent (secret|config) key.*', said
            )
            if found:
                text = found[0].replace("references", "it references")
                return _config_error(f"configmap: {text}" if found[2] == "config" else text, pod_place(pod))
    return None


def _config_error(said: str, place: str) -> InputError:
    kind = re.search(r"\b(secret|configmap)\b", said, re.IGNORECASE)
    if kind is None:
        hint = "the image, its environment and its security context do not fit together"
        return InputError(f"the container cannot be set up: {said}", place=place, hint=hint, code="invalid-container")
    secret = kind[1].lower() == "secret"
    return InputError(
        f"the container cannot be set up: {said}",
        place=place,
        hint=f"create the {'Secret' if secret else 'ConfigMap'} in the pod's namespace, with the key that is asked for",
        code="secret-not-found" if secret else "config-map-not-found",
    )


def start_error(said: str, place: str) -> JobError:
    """Return the error of a container whose program the runtime could not start."""
    short = said.rpartition("unable to start container process: ")[2] or said
    return JobError(
        f"the container cannot be started: {short}",
        place=place,
        hint="look whether the image has the program, for the node's processor",
        code="container-not-started",
    )


def _pull_failure(image: str, events: Sequence[Object]) -> str:
    for event in reversed(events):
        message = event.get("message") or ""
        head = f'Failed to pull image "{image}": '
        if event.get("reason") == "Failed" and message.startswith(head):
            return message.removeprefix(head)
    return ""


def _unwrapped(text: str) -> str:
    return _WRAPPINGS.sub("", text)


def _pull_hint(pod: Object, image: str, reason: str, said: str) -> str:
    head = image.partition("/")[0]
    registry = head if "/" in image and re.search(r"[.:]|^localhost$", head) else "docker.io"
    secrets = ", ".join(item["name"] for item in pod["spec"].get("imagePullSecrets") or []) or "none"
    text = said.lower()
    if reason == "InvalidImageName":
        return "correct the image's name"
    if "no match for platform" in text:
        return "the image was not built for the node's processor"
    if re.search(r"unauthorized|authentication|authorization|denied|forbidden|\b40[13]\b", text):
        return f"imagePullSecrets must name a Secret with credentials for {registry}; the pod has: {secrets}"
    if re.search(r"not found|manifest unknown|no such|does not exist", text) and "no such host" not in text:
        return f"no such image, or not for who asks: check name and tag; the pod's imagePullSecrets: {secrets}"
    if "x509" in text or "certificate" in text:
        return f"{node_of(pod)} does not trust the certificate of {registry}"
    if re.search(r"no such host|refused|timeout|timed out|unreachable|i/o|eof", text):
        return f"{registry} cannot be reached from {node_of(pod)}"
    return f"see whether {node_of(pod)} can pull it from {registry}; the pod's imagePullSecrets: {secrets}"
