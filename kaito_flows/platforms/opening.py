"""The platform that the settings name."""

from __future__ import annotations

from kaito_flows.platforms.base import Platform
from kaito_flows.platforms.local import LocalPlatform
from kaito_flows.settings import Settings


def open_platform(settings: Settings, namespace: str = "", run_id: str = "") -> Platform:
    """Return the platform; `namespace` is the Workspace's, `run_id` names the run that asks.

    An empty namespace means that of the settings, or else of the kubeconfig.

    Raises:
        InputError: (code `no-cluster`) the settings say Kubernetes, and none is known.
    """
    if settings.platform == "local":
        return LocalPlatform(settings)
    from kaito_flows.platforms.kubernetes import KubernetesPlatform  # the Kubernetes client takes a second to import

    return KubernetesPlatform(settings, namespace=namespace or settings.namespace, run_id=run_id)
