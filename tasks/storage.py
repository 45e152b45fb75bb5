"""Where the images of a Workspace go: its output's repository, or the one that the settings name."""

from __future__ import annotations

from kaito_flows.errors import PlanError
from kaito_flows.oci.repository import Repository
from kaito_flows.platforms import Platform
from kaito_flows.settings import Settings
from kaito_flows.workspace import Workspace


def push_secrets(workspace: Workspace) -> tuple[str, ...]:
    """The Secrets with which the Workspace's images are pushed and pulled again."""
    tuning, settings = workspace.tuning, Settings()
    if tuning is None or not tuning.output.image:
        return (settings.repository_secret,) if settings.repository_secret else ()
    return (tuning.output.image_push_secret,) if tuning.output.image_push_secret else ()


def repository_of(workspace: Workspace, platform: Platform) -> Repository:
    """Return the repository for the Workspace's dataset, checkpoints and adapters.

    Raises:
        PlanError: (code `no-repository`) its output is a volume, and the settings name no repository.
    """
    image = workspace.tuning.output.image if workspace.tuning else ""
    image = image or Settings().repository
    if not image:
        hint = "set KAITO_FLOWS_REPOSITORY (and KAITO_FLOWS_REPOSITORY_SECRET) for the worker, or write output.image"
        place = "tuning.output.volumeSource"
        raise PlanError("data and checkpoints need a repository", place=place, hint=hint, code="no-repository")
    secrets = push_secrets(workspace) if platform.kind == "kubernetes" else ()
    return platform.repository(image, secrets)
