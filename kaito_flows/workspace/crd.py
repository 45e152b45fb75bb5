"""The CustomResourceDefinition of `Workspace`, made from the models in `spec.py`: what they refuse, a cluster refuses.

    python -m kaito_flows.workspace.crd > deployments/kubernetes/base/crd.yaml

The models give types, defaults, limits and words. What they leave to `validation.py` (exactly one of, names, addresses)
stands in `RULES`, by model, in the part of JSON Schema that Kubernetes takes. What no schema can say is told by the
watcher as a condition: `inference` or `tuning`, not both (Kubernetes takes no `oneOf` at the root of an object that has
a status), and whether a preset is known. An unknown key is dropped by the API server before anybody sees it; kubectl
warns of it from 1.25 on, `kaito-flows validate` always.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from kaito_flows.reference import PATTERN as REFERENCE
from kaito_flows.workspace import spec
from kaito_flows.workspace.validation import DNS_LABEL, DNS_SUBDOMAIN, STRENGTH

GROUP = "kaito.sh"
PLURAL = "workspaces"
NAME = f"{PLURAL}.{GROUP}"

Schema = dict[str, Any]

_PUBLIC_URL = r"^[hH][tT][tT][pP][sS]?://[^/?#]"
# Loopback, private and link-local hosts, as far as they can be told by their spelling.
_INNER_HOSTS = (
    r"(.+\.)?localhost|metadata\.google\.internal|metadata\.google|instance-data\.ec2\.internal"
    r"|(0|10|127)(\.[0-9]{1,3}){3}|192\.168(\.[0-9]{1,3}){2}|169\.254(\.[0-9]{1,3}){2}"
    r"|172\.(1[6-9]|2[0-9]|3[01])(\.[0-9]{1,3}){2}|\[(::1?|f[cd][0-9a-f:]*|fe[89ab][0-9a-f:]*)\]"
)
_INNER_URL = rf"^[a-zA-Z]+://([^/?#]*@)?(?i:{_INNER_HOSTS})(:[0-9]*)?([/?#]|$)"
# An example's `..._HERE` is taken, so that a file can be tried; it is refused before a run.
_IMAGE = rf"^({REFERENCE})?$|_HERE"
_URLS = {"pattern": _PUBLIC_URL, "not": {"pattern": _INNER_URL}, "maxLength": 2048}


def _given(key: str, **limits: Any) -> Schema:
    """The key is there and not empty; Go's `omitempty` makes no difference between the two, nor do we."""
    return {"required": [key], **({"properties": {key: limits}} if limits else {})}


_IMAGE_GIVEN = _given("image", minLength=1)
_VOLUME_GIVEN = _given("volumeSource", minProperties=1)

RULES: Mapping[type[BaseModel], Schema] = {
    spec.MatchExpression: {"properties": {"operator": {"enum": ["In"]}}},
    spec.LabelSelector: {"x-kubernetes-map-type": "atomic"},
    spec.PresetSpec: {"properties": {"name": {"minLength": 1}}},
    # KAITO's webhook takes any case; `enum` would not.
    spec.TuningSpec: {"properties": {"method": {"pattern": "^[qQ]?[lL][oO][rR][aA]$"}}},
    spec.DataSource: {
        "oneOf": [_given("urls", minItems=1), _IMAGE_GIVEN, _VOLUME_GIVEN],
        "properties": {"image": {"pattern": _IMAGE}, "urls": {"maxItems": 1000, "items": _URLS}},
    },
    spec.DataDestination: {
        "oneOf": [_IMAGE_GIVEN, _VOLUME_GIVEN],
        "anyOf": [_given("imagePushSecret", minLength=1), {"not": _IMAGE_GIVEN}],
        "properties": {
            "image": {"pattern": _IMAGE},
            "imagePushSecret": {"maxLength": 253, "pattern": rf"^({DNS_SUBDOMAIN.pattern})?$|_HERE"},
        },
    },
    spec.InferenceSpec: {"oneOf": [_given("preset"), _given("template", minProperties=1)]},
    spec.AdapterSpec: {
        "properties": {
            "strength": {"pattern": rf"^({STRENGTH.pattern})$"},
            "source": {
                "required": ["name"],
                "oneOf": [_IMAGE_GIVEN, _VOLUME_GIVEN],
                "properties": {
                    "name": {"maxLength": 253, "pattern": rf"^{DNS_SUBDOMAIN.pattern}$"},
                    "urls": {"maxItems": 0},
                },
            },
        }
    },
}


def _condition_column(name: str, condition: str = "") -> Schema:
    path = f'.status.conditions[?(@.type=="{condition or name}")].status'
    return {"name": name, "type": "string", "jsonPath": path}


_INSTANCE = {"name": "Instance", "type": "string", "jsonPath": ".resource.instanceType"}
_READY = [_INSTANCE, _condition_column("ResourceReady"), _condition_column("InferenceReady")]
_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
COLUMNS: Mapping[str, list[Schema]] = {
    "v1alpha1": [*_READY, _condition_column("WorkspaceReady", "WorkspaceSucceeded"), _AGE],
    "v1beta1": [
        *_READY,
        _condition_column("JobStarted"),
        _condition_column("WorkspaceSucceeded"),
        {"name": "State", "type": "string", "jsonPath": ".status.state"},
        {"name": "TargetNodeCount", "type": "integer", "jsonPath": ".status.targetNodeCount"},
        _AGE,
    ],
}


def _text(description: str = "", **more: Any) -> Schema:
    return {"type": "string", **({"description": description} if description else {}), **more}


def _facts(description: str, **properties: Schema) -> Schema:
    return {"type": "object", "description": description, "properties": properties}


_COUNT = {"type": "integer", "format": "int64", "minimum": 0}
_CONDITION: Schema = {
    "type": "object",
    "description": "One aspect of the Workspace's state, as every Kubernetes object tells it.",
    "required": ["type", "status"],
    "properties": {
        "type": _text("ResourceReady, JobStarted, InferenceReady, WorkspaceSucceeded and so on.", maxLength=316),
        "status": _text(enum=["True", "False", "Unknown"]),
        "reason": _text("One word for programs.", maxLength=1024),
        "message": _text("One line for people.", maxLength=32768),
        "lastTransitionTime": _text("When the status changed last.", format="date-time"),
        "observedGeneration": {**_COUNT, "description": "The generation that it was said of."},
    },
}
_PRESERVED: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
STATUS: Schema = _facts(
    "What became of the Workspace; written by kaito-flows.",
    observedGeneration={**_COUNT, "description": "The generation that was acted upon last."},
    state=_text("Pending, Running, Ready, NotReady, Succeeded, Failed or Stopped."),
    conditions={
        "type": "array",
        "items": _CONDITION,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
    },
    workerNodes={"type": "array", "items": {"type": "string"}, "description": "The nodes that work for it."},
    targetNodeCount={"type": "integer", "format": "int32", "description": "How many nodes it takes."},
    performance={**_PRESERVED, "description": "What an inference service was measured to do."},
    run=_facts(
        "The flow run that works for it.",
        flowRunId=_text("The run's id in Prefect."),
        identity=_text("The run's identity: same identity, same adapter."),
        generation={**_COUNT, "description": "The generation that it runs for."},
        step={**_COUNT, "description": "The training step that is done."},
        steps={**_COUNT, "description": "How many training steps there are."},
        loss={"type": "number", "description": "The loss of that step."},
        message=_text("What it does now."),
    ),
    adapter=_facts(
        "The adapter that was published.",
        image=_text("The image that was written to."),
        digest=_text("The digest of its manifest."),
    ),
    service=_facts("The service that answers.", url=_text("Where it answers, in the cluster.")),
    cost=_facts(
        "What the nodes of the last run cost.",
        usd={"type": "number", "description": "USD, from when they were asked for until they were given back."},
        gpuHours={"type": "number", "description": "Hours from when they were asked for, times GPUs."},
        trainingShare={"type": "number", "description": "The share of paidSeconds that was spent in training."},
        paidSeconds={"type": "number", "description": "Seconds from when they were ready until they were given back."},
        bootSeconds={"type": "number", "description": "Seconds from when they were asked for until they were ready."},
    ),
)


def schema_of(model: type[BaseModel]) -> Schema:
    """Return the structural schema of a Workspace model."""
    made = model.model_json_schema(by_alias=True)
    models = {m.__name__: m for m in _models()}
    schema = _structural(made, made.get("$defs", {}), models)
    schema = _merged(schema, _rules_of(model))
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 63, "pattern": f"^{DNS_LABEL.pattern}$"}},
    }
    for key in ("apiVersion", "kind"):
        schema["properties"][key] = {"type": "string"}
    schema["properties"]["status"] = copy.deepcopy(STATUS)
    schema["required"] = [key for key in schema["required"] if key != "metadata"]
    return schema


def _models() -> list[type[BaseModel]]:
    return [m for m in vars(spec).values() if isinstance(m, type) and issubclass(m, BaseModel)]


def _rules_of(model: type[BaseModel]) -> Schema:
    """The rules of a model and of those that it is made from."""
    rules: Schema = {}
    for base in reversed(model.__mro__):
        rules = _merged(rules, RULES.get(base, {}))
    return rules


def _structural(node: Mapping[str, Any], defs: Mapping[str, Any], models: Mapping[str, type[BaseModel]]) -> Schema:
    """Turn a node of pydantic's schema into Kubernetes' structural form: no references, no nulls, no `title` alone."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        found = _merged(_structural(defs[name], defs, models), _rules_of(models[name]))
        # What the field says of itself goes before what its model says.
        return _merged(found, _words(node))
    if "anyOf" in node:
        [only] = [option for option in node["anyOf"] if option.get("type") != "null"]
        return _merged(_structural(only, defs, models), _words(node))
    schema = _words(node)
    for key in ("type", "enum", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems"):
        if key in node:
            schema[key] = node[key]
    if "const" in node:
        schema["enum"] = [node["const"]]
    if "items" in node:
        schema["items"] = _structural(node["items"], defs, models)
    if "properties" in node:
        schema["properties"] = {key: _structural(value, defs, models) for key, value in node["properties"].items()}
        schema["required"] = list(node.get("required", []))
        if not schema["required"]:
            del schema["required"]
    elif node.get("type") == "object":
        values = node.get("additionalProperties")
        if isinstance(values, Mapping):
            schema["additionalProperties"] = _structural(values, defs, models)
        else:
            schema["x-kubernetes-preserve-unknown-fields"] = True
    return schema


def _words(node: Mapping[str, Any]) -> Schema:
    """Title, description and default; an empty default says nothing, and would count as given."""
    words = {key: node[key] for key in ("title", "description") if key in node}
    if node.get("default") and isinstance(node["default"], str | int):
        words["default"] = node["default"]
    return words


def _merged(schema: Mapping[str, Any], rules: Mapping[str, Any]) -> Schema:
    """The schema with the rules laid over it, properties by properties; a pattern stands in for an enum."""
    merged = {**copy.deepcopy(dict(schema))}
    for key, value in rules.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif key == "required" and key in merged:
            merged[key] = sorted({*merged[key], *value})
        else:
            merged[key] = copy.deepcopy(value)
    if "pattern" in rules:
        merged.pop("enum", None)
    return merged


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition `workspaces.kaito.sh`, with both of KAITO's versions."""
    versions: dict[str, type[BaseModel]] = {"v1alpha1": spec.WorkspaceV1alpha1, "v1beta1": spec.WorkspaceV1beta1}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {"app.kubernetes.io/name": "kaito-flows"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": PLURAL,
                "singular": "workspace",
                "kind": "Workspace",
                "listKind": "WorkspaceList",
                "shortNames": ["wk", "wks"],
                "categories": ["workspace"],
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": version == "v1beta1",
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": COLUMNS[version],
                    "schema": {"openAPIV3Schema": schema_of(model)},
                }
                for version, model in versions.items()
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """YAML without anchors: what is said twice is written twice, as people and tools expect of a manifest."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml() -> str:
    """The definition as the file in `deployments/` holds it."""
    head = "# Made by `python -m kaito_flows.workspace.crd` from kaito_flows/workspace/spec.py; do not edit.\n"
    return head + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.stdout.write(as_yaml())
