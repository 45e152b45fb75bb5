"""Whose a tag is: two Workspaces that publish to the same one would overwrite each other's adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kaito_flows.errors import ImageError, InputError
from kaito_flows.reference import Reference

Object = Mapping[str, Any]


def check_output(workspaces: Iterable[Object], name: str, image: str) -> None:
    """Raise if another of the namespace's Workspaces has the output: it published there, or it was there first.

    One that has failed and has published nothing has no claim, and neither has one that is being deleted.

    Raises:
        InputError: (code `output-taken`).
    """
    wanted = Reference.parse(image)
    sharing = [found for found in workspaces if _output(found) == wanted]
    own: Object = next((found for found in sharing if found["metadata"]["name"] == name), {})
    if _has_published(own):
        return
    for other in sharing:
        meta = other["metadata"]
        if meta["name"] == name or meta.get("deletionTimestamp"):
            continue
        failed = other.get("status", {}).get("state") == "Failed"
        if _has_published(other) or (not failed and _age(other) < _age(own)):
            raise InputError(
                f"the Workspace {meta['name']} publishes to {image}, too",
                place="tuning.output.image",
                hint=f"give this one a tag of its own, or delete the other: kubectl delete workspace {meta['name']}",
                code="output-taken",
            )


def _output(workspace: Object) -> Reference | None:
    return _reference(workspace.get("tuning", {}).get("output", {}).get("image", ""))


def _has_published(workspace: Object) -> bool:
    published = _reference(workspace.get("status", {}).get("adapter", {}).get("image", ""))
    return published is not None and published == _output(workspace)


def _reference(image: str) -> Reference | None:
    try:
        return Reference.parse(image) if image else None
    except ImageError:
        return None  # what cannot be used is nobody's rival


def _age(workspace: Object) -> tuple[str, str]:
    meta = workspace.get("metadata", {})
    return meta.get("creationTimestamp", ""), meta.get("name", "")
