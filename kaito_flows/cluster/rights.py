"""What the caller may do, asked before it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kaito_flows.cluster.resources import Object

if TYPE_CHECKING:
    from kaito_flows.cluster.gateway import Cluster


@dataclass(frozen=True, slots=True)
class Right:
    """A verb on a resource, as RBAC spells it: `Right("create", "jobs", "batch")`, `Right("get", "pods/log")`."""

    verb: str
    resource: str
    group: str = ""

    def __str__(self) -> str:
        resource, _, sub = self.resource.partition("/")
        return f"{self.verb} {resource}{'.' if self.group else ''}{self.group}{'/' if sub else ''}{sub}"


def may(cluster: Cluster, right: Right, namespace: str) -> bool:
    """Whether the API server says that the caller has the right."""
    resource, _, sub = right.resource.partition("/")
    attributes = {"namespace": namespace, "verb": right.verb, "group": right.group, "resource": resource}
    answer = cluster.create(
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "metadata": {},
            "spec": {"resourceAttributes": {**attributes, **({"subresource": sub} if sub else {})}},
        }
    )
    return bool(answer["status"].get("allowed"))


def missing(cluster: Cluster, rights: Sequence[Right]) -> list[Right]:
    """Return the rights that the caller lacks in the namespace.

    All rules are read in one request. Authorizers other than RBAC may not tell theirs: what no rule allows is asked
    for one by one.
    """
    answer = cluster.create(
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "metadata": {},
            "spec": {"namespace": cluster.namespace},
        }
    )
    rules = answer["status"].get("resourceRules") or []
    told = [right for right in rights if any(_allows(rule, right) for rule in rules)]
    return [right for right in rights if right not in told and not may(cluster, right, cluster.namespace)]


def _allows(rule: Object, right: Right) -> bool:
    def names(key: str, wanted: str) -> bool:
        return bool({"*", wanted} & set(rule.get(key) or []))

    return (
        not rule.get("resourceNames")
        and names("verbs", right.verb)
        and names("apiGroups", right.group)
        and names("resources", right.resource)
    )
