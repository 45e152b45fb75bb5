"""Platforms: where jobs run to their end and services stay up."""

from kaito_flows.platforms.base import Event, JobSpec, Platform, Service, ServiceSpec
from kaito_flows.platforms.local import LocalPlatform

__all__ = ["Event", "JobSpec", "LocalPlatform", "Platform", "Service", "ServiceSpec"]
