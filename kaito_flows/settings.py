"""What a user can set once for all runs: environment variables that begin with `KAITO_FLOWS_`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from kaito_flows.reference import Reference


class Settings(BaseSettings):
    """The settings, each from the environment (`KAITO_FLOWS_HOME` and so on) or its default."""

    model_config = SettingsConfigDict(env_prefix="KAITO_FLOWS_", frozen=True)

    home: Path = Field(
        default_factory=lambda: Path.home() / ".kaito-flows",
        description="Where models, datasets, adapters, jobs and services of this machine are kept.",
    )
    serve_host: str = Field("127.0.0.1", description="The address that services on this machine listen on.")
    serve_port: int | None = Field(
        None, ge=1, le=65535, description="The port of a service on this machine; unset: a free one from 5000 up."
    )

    @cached_property
    def folder(self) -> Path:
        """`home`, absolute and without `~`."""
        return self.home.expanduser().absolute()

    def repository(self, reference: Reference) -> Path:
        """The OCI layout folder that stands for an image repository on this machine."""
        # A colon would end the path in skopeo's spelling `oci:<path>:<tag>`.
        return self.folder / "registry" / reference.registry.replace(":", "_") / reference.repository
