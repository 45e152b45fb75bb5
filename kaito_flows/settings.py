"""What a user can set once for all runs: environment variables that begin with `KAITO_FLOWS_`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from kaito_flows import __version__
from kaito_flows.reference import Reference


class Settings(BaseSettings):
    """The settings, each from the environment (`KAITO_FLOWS_HOME` and so on) or its default."""

    model_config = SettingsConfigDict(env_prefix="KAITO_FLOWS_", frozen=True)

    platform: Literal["local", "kubernetes"] = Field("local", description="Where jobs and services run.")
    home: Path = Field(
        default_factory=lambda: Path.home() / ".kaito-flows",
        description="Where models, datasets, adapters, jobs and services of this machine are kept.",
    )
    serve_host: str = Field("127.0.0.1", description="The address that services on this machine listen on.")
    serve_port: int | None = Field(
        None, ge=1, le=65535, description="The port of a service on this machine; unset: a free one from 5000 up."
    )
    namespace: str = Field("", description="The namespace; empty: the Workspace's, else that of the kubeconfig.")
    tuner_image: str = Field(f"kaito-flows/tuner:{__version__}", description="The image of tuning pods.")
    server_image: str = Field(f"kaito-flows/server:{__version__}", description="The image of serving pods.")
    worker_image: str = Field(
        f"kaito-flows/worker:{__version__}",
        description="The image of flow runs, by which a rented node also fetches weights ahead.",
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent")
    image_pull_secrets: str = Field("", description="Secrets for those images, separated by commas.")
    insecure_registries: str = Field("", description="Registries that are spoken to over plain HTTP: host[:port], …")
    repository: str = Field(
        "", description="Where datasets, checkpoints and adapters go when the Workspace's output is a volume."
    )
    repository_secret: str = Field("", description="The Secret for that repository.")
    weights_cache: str = Field(
        "",
        pattern=r"^(|node:/.+|claim:[a-z0-9.-]+)$",
        description="Where pods keep base models: `node:/folder` of the node, `claim:NAME`; empty: not beyond the pod.",
    )
    job_cpu: str = Field("500m", description="The CPU that a tuning or serving pod asks for.")
    job_memory: str = Field("", description="The memory that it asks for; empty: by the model's size.")
    job_deadline_hours: float = Field(24.0, gt=0, description="No job lasts longer, waiting included.")
    job_kept_seconds: int = Field(3600, ge=0, description="How long a job that ended is kept for its logs.")
    checkpoint_seconds: float = Field(300.0, ge=0, description="How often a checkpoint goes to the registry.")
    pending_seconds: float = Field(900.0, gt=0, description="How long a pod may wait for a node before the run fails.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="The port where the watcher answers Prometheus (/metrics); 0: none."
    )

    nodes: str = Field(
        "existing",
        pattern=r"^(existing|karpenter|aks)(,(existing|karpenter|aks))*$",
        description="Where GPU nodes come from, in the order in which it is tried: existing, karpenter, aks.",
    )
    place: str = Field(
        "kubernetes",
        pattern=r"^[\w.-]+$",
        description="What this cluster's work pool and deployments are called, where several share a Prefect server.",
    )
    elsewhere: str = Field(
        "",
        pattern=r"^(|[\w.-]+(,[\w.-]+)*)$",
        description="Other places, where a run tunes when no node can be had here, in the order in which it is tried.",
    )
    owner: str = Field("kaito-flows", max_length=63, description="Tells installations that share a cluster apart.")
    capacity: Literal["on-demand", "spot", "spot,on-demand"] = Field(
        "on-demand", description="What is rented; the annotation kaito-flows/capacity says otherwise for a Workspace."
    )
    zones: str = Field("", description="The zones in which nodes are rented, in this order: `1,2,3`; empty: any.")
    max_price_usd_hour: float | None = Field(None, gt=0, description="No node that costs more is rented.")
    max_cost_usd: float | None = Field(
        None,
        gt=0,
        description="What a run's nodes may cost; the annotation kaito-flows/max-cost-usd is for a Workspace.",
    )
    lease_minutes: float = Field(60.0, ge=5, description="How long a lease of rented nodes lasts at first.")
    grace_seconds: float = Field(
        0.0, ge=0, description="How long a node is kept for the Workspace's next run, when one has succeeded."
    )
    node_ready_seconds: float = Field(1200.0, gt=0, description="How long a node that was asked for may take.")
    capacity_seconds: float = Field(1800.0, ge=0, description="How long a run waits for any of the sizes to be had.")
    aks_subscription: str = Field("", description="The Azure subscription of the cluster.")
    aks_resource_group: str = Field("", description="The cluster's resource group.")
    aks_cluster: str = Field("", description="The cluster's name in Azure.")
    aks_spot_max_price: float = Field(-1.0, description="USD an hour that a spot node may cost; -1: as on demand.")
    karpenter_node_class: str = Field("", description="`KIND/NAME` of the node class; empty: the one that is there.")

    @cached_property
    def folder(self) -> Path:
        """`home`, absolute and without `~`."""
        return self.home.expanduser().absolute()

    @property
    def other_places(self) -> tuple[str, ...]:
        """The places where a run tunes when no node can be had here, in the order in which they are tried."""
        return tuple(filter(None, self.elsewhere.split(",")))

    @property
    def rents(self) -> bool:
        """Whether nodes may be rented."""
        return self.platform == "kubernetes" and self.nodes != "existing"

    def layout(self, reference: Reference) -> Path:
        """The OCI layout folder that stands for an image repository on this machine."""
        # A colon would end the path in skopeo's spelling `oci:<path>:<tag>`.
        return self.folder / "registry" / reference.registry.replace(":", "_") / reference.repository
