"""Platforms: where jobs and services run. `open_platform` gives the one that the settings name."""

from kaito_flows.platforms.base import Event, JobSpec, Placement, Platform, Service, ServiceSpec, Weights
from kaito_flows.platforms.local import LocalPlatform
from kaito_flows.platforms.opening import open_platform

__all__ = [
    "Event",
    "JobSpec",
    "LocalPlatform",
    "Placement",
    "Platform",
    "Service",
    "ServiceSpec",
    "Weights",
    "open_platform",
]
