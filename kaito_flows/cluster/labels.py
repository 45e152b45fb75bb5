"""Names and labels of what is made in a cluster: computed from what it is for, and never too long.

A Workspace's name may have 63 characters, as many as a label's value, a Service or a Job's pods can have: what is put
behind it has to displace something. A name that is cut ends in a hash of the whole, so that two never become one.
"""

from __future__ import annotations

import hashlib
import re

SPEC_HASH = "kaito-flows/spec-hash"
"""The annotation that says from what an object was made; `Cluster.ensure` adopts by it."""

FIELD_MANAGER = "kaito-flows"
WORKSPACE = "kaito.sh/workspace"
RUN_ID = "kaito-flows/run-id"
COMPONENT = "app.kubernetes.io/component"

MAX_LENGTH = 63
_HASH_LENGTH = 8


def labels(workspace: str, component: str, run_id: str = "") -> dict[str, str]:
    """Return the labels of what belongs to a Workspace; `component` says which part of it: `tuner`, `server`, …"""
    found = {
        "app.kubernetes.io/name": "kaito-flows",
        "app.kubernetes.io/instance": label_value(workspace),
        "app.kubernetes.io/managed-by": "kaito-flows",
        "app.kubernetes.io/part-of": "kaito-flows",
        COMPONENT: label_value(component),
        WORKSPACE: label_value(workspace),
    }
    return {**found, RUN_ID: label_value(run_id)} if run_id else found


def selector(workspace: str, component: str = "", run_id: str = "") -> dict[str, str]:
    """Return the labels that find what belongs to a Workspace: all of it, one component's, or one run's."""
    wanted = {"app.kubernetes.io/managed-by": "kaito-flows", WORKSPACE: label_value(workspace)}
    if component:
        wanted[COMPONENT] = label_value(component)
    if run_id:
        wanted[RUN_ID] = label_value(run_id)
    return wanted


def object_name(*parts: str, max_length: int = MAX_LENGTH) -> str:
    """Return a DNS-1123 label made of the parts, joined by hyphens.

    What cannot stand in one becomes a hyphen. Where that, or cutting, loses something, the name ends in eight hex
    digits of the parts' hash.
    """
    text = "-".join(parts)
    name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    # A Service's name must begin with a letter.
    if not name[:1].isalpha():
        name = f"x-{name}".rstrip("-")
    return name if name == text and len(name) <= max_length else _cut(name, text, max_length, "-")


def label_value(text: str) -> str:
    """Return the text as a label's value: itself where that is allowed, else changed as by `object_name`."""
    value = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")
    return value if value == text and len(value) <= MAX_LENGTH else _cut(value, text, MAX_LENGTH, "-_.")


def _cut(name: str, text: str, max_length: int, ends: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]
    head = name[: max_length - _HASH_LENGTH - 1].rstrip(ends)
    return f"{head}-{digest}" if head else f"x-{digest}"
