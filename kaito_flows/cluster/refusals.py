"""What the API server says when it refuses, as errors that name what was asked and what to do."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from kaito_flows.cluster.resources import Resource
from kaito_flows.errors import AccessError, ClusterError, InputError, KaitoFlowsError

_MAX_LENGTH = 500


class ConflictError(ClusterError):
    """An object of that name is there already, or has changed since it was read."""

    code = "conflict"
    retryable = False


class MissingError(ClusterError):
    """There is no such object (any more)."""

    code = "not-found"
    retryable = False


class ExpiredError(ClusterError):
    """The API server no longer knows the changes since a resource version: list again."""

    code = "expired"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the API server, for errors to name it."""

    verb: str
    resource: Resource
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def target(self) -> str:
        """The resource as RBAC names it: `pods`, `pods/log`, `jobs.batch`."""
        group = f".{self.resource.group}" if self.resource.group else ""
        return f"{self.resource.plural}{group}" + (f"/{self.subresource}" if self.subresource else "")

    @property
    def place(self) -> str:
        """The object as a user names it: `Job team-a/phi-3`."""
        path = "/".join(part for part in (self.namespace if self.resource.namespaced else "", self.name) if part)
        return f"{self.resource.kind} {path}".rstrip()


def is_route_missing(status: int, body: str) -> bool:
    """Whether the API server does not know the kind at all; what it knows, it misses in JSON."""
    return status == 404 and not _status_of(body)


def refusal(request: Request, status: int, body: str) -> KaitoFlowsError:
    """Return the error for an answer that is neither a success nor worth another try."""
    said = _status_of(body)
    message = str(said.get("message") or body.strip()[:500] or f"HTTP {status}")
    reason = str(said.get("reason", ""))
    place = request.place
    if status == 401:
        return AccessError(
            "the API server does not know who this is",
            place=place,
            hint="log in again, or renew the kubeconfig's token or certificate",
            code="not-logged-in",
        )
    if status == 403:
        return _forbidden(request, message, said)
    if status == 404:
        return _missing(request, message, said)
    if status == 409:
        if "is being terminated" in message:
            return _terminating(request)
        return ConflictError(message, place=place)
    if status == 410:
        return ExpiredError(message, place=place)
    if status in (400, 413, 422):
        return InputError(
            f"the API server does not take it: {_short(_causes(said) or message)}", place=place, code="invalid-object"
        )
    return ClusterError(f"HTTP {status} {reason}: {message}", place=place)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} …"


def _status_of(body: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) and value.get("kind") == "Status" else {}


def _causes(said: dict[str, Any]) -> str:
    details = said.get("details") or {}
    causes = [
        f"{cause.get('field', '')}: {cause.get('message', '')}".strip(": ") for cause in details.get("causes") or []
    ]
    return "; ".join(causes)


def _forbidden(request: Request, message: str, said: dict[str, Any]) -> KaitoFlowsError:
    causes = (said.get("details") or {}).get("causes") or []
    if "is being terminated" in message or any(cause.get("reason") == "NamespaceTerminating" for cause in causes):
        return _terminating(request)
    if "exceeded quota" in message:
        quota = message.partition("exceeded quota: ")[2] or message
        hint = "free some of it, or ask for a larger ResourceQuota"
        return InputError(
            f"the namespace's quota is used up: {quota}", place=request.place, hint=hint, code="quota-exceeded"
        )
    user = re.search(r'User "([^"]*)" cannot', message)
    if user is None:
        hint = "an admission rule of the cluster says no"
        return AccessError(message, place=request.place, hint=hint, code="admission-refused")
    where = (
        f"in namespace '{request.namespace}'" if request.resource.namespaced and request.namespace else "cluster-wide"
    )
    role = "Role" if request.resource.namespaced and request.namespace else "ClusterRole"
    return AccessError(
        f"{user[1]} may not {request.verb} {request.target} {where}",
        place=request.place,
        hint=f"a {role} bound to it must allow '{request.verb}' on '{request.target}'",
    )


def _terminating(request: Request) -> InputError:
    return InputError(
        f"the namespace '{request.namespace}' is being deleted",
        place=request.place,
        hint="wait until it is gone and create it anew, or use another one",
        code="namespace-terminating",
    )


def _missing(request: Request, message: str, said: dict[str, Any]) -> KaitoFlowsError:
    kind = request.resource
    if not said:
        hint = f"install the definition of {kind.kind} ({kind.api_version}) in the cluster"
        if kind.group == "kaito.sh":
            hint = "kubectl apply -k deployments/kubernetes installs it"
        return InputError(
            f"the cluster does not know {kind.plural} of {kind.api_version}",
            place=request.place,
            hint=hint,
            code="crd-not-installed",
        )
    if (said.get("details") or {}).get("kind") == "namespaces" and kind.kind != "Namespace":
        hint = f"kubectl create namespace {request.namespace}"
        missing = f"there is no namespace '{request.namespace}'"
        return InputError(missing, place=request.place, hint=hint, code="namespace-not-found")
    return MissingError(message, place=request.place)
