"""Where the API server keeps each kind of object.

Objects are plain dicts, as YAML has them. A kind is named `Job`, or with its API version where there is more than one:
`kaito.sh/v1alpha1/Workspace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from kaito_flows.errors import InputError

Object = dict[str, Any]
"""A Kubernetes object: `apiVersion`, `kind`, `metadata` and the rest."""

_NAMESPACED = {
    "ConfigMap": ("v1", "configmaps"),
    "Endpoints": ("v1", "endpoints"),
    "Event": ("v1", "events"),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims"),
    "Pod": ("v1", "pods"),
    "Secret": ("v1", "secrets"),
    "Service": ("v1", "services"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "ControllerRevision": ("apps/v1", "controllerrevisions"),
    "Deployment": ("apps/v1", "deployments"),
    "ReplicaSet": ("apps/v1", "replicasets"),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "Job": ("batch/v1", "jobs"),
    "Lease": ("coordination.k8s.io/v1", "leases"),
    "ResourceQuota": ("v1", "resourcequotas"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"),
    "Workspace": ("kaito.sh/v1beta1", "workspaces"),
}
_CLUSTER_WIDE = {
    "Namespace": ("v1", "namespaces"),
    "Node": ("v1", "nodes"),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "AKSNodeClass": ("karpenter.azure.com/v1beta1", "aksnodeclasses"),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "EC2NodeClass": ("karpenter.k8s.aws/v1", "ec2nodeclasses"),
    "KaitoNodeClass": ("kaito.sh/v1alpha1", "kaitonodeclasses"),
    "Machine": ("karpenter.sh/v1alpha5", "machines"),
    "NodeClaim": ("karpenter.sh/v1", "nodeclaims"),
    "NodePool": ("karpenter.sh/v1", "nodepools"),
    "PriorityClass": ("scheduling.k8s.io/v1", "priorityclasses"),
    "SelfSubjectAccessReview": ("authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "SelfSubjectRulesReview": ("authorization.k8s.io/v1", "selfsubjectrulesreviews"),
}


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object in one API version."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def group(self) -> str:
        """The API group; empty for the core."""
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        """Return the path of the collection, or of an object in it."""
        parts = ["apis" if self.group else "api", self.api_version]
        if self.namespaced and namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts += [self.plural, *(quote(part, safe="") for part in (name, subresource) if part)]
        return "/" + "/".join(parts)


def resource(kind: str) -> Resource:
    """Return what `Job` or `batch/v1/Job` stands for.

    Raises:
        InputError: the kind is none that kaito-flows works with.
    """
    api_version, _, kind = kind.rpartition("/")
    for namespaced, table in ((True, _NAMESPACED), (False, _CLUSTER_WIDE)):
        if kind in table:
            usual, plural = table[kind]
            return Resource(api_version or usual, kind, plural, namespaced)
    raise InputError(f"kaito-flows does not know the kind '{kind}'", code="unknown-kind")


def resource_of(manifest: Mapping[str, Any]) -> Resource:
    """Return what a manifest's `apiVersion` and `kind` stand for.

    Raises:
        InputError: one of them is missing, or the kind is none that kaito-flows works with.
    """
    api_version, kind = manifest.get("apiVersion"), manifest.get("kind")
    if not api_version or not kind:
        raise InputError("a manifest needs apiVersion and kind", code="invalid-object")
    return resource(f"{api_version}/{kind}")


def selector(labels: Mapping[str, str] | str | None) -> str:
    """Return the text form of a label or field selector."""
    if labels is None or isinstance(labels, str):
        return labels or ""
    return ",".join(f"{key}={value}" for key, value in labels.items())
