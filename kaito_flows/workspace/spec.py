"""KAITO's `Workspace` as pydantic models: `kaito.sh/v1alpha1` and `kaito.sh/v1beta1`, field by field.

The resource has no `spec:`; `resource`, `inference` and `tuning` stand at the top level, as KAITO has them. Field names
are Kubernetes' camelCase outside and snake_case inside. Unknown keys are refused. What a schema cannot say
(exactly one of, names of presets) is in `validation.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

__all__ = [
    "DataDestination",
    "DataSource",
    "Method",
    "ObjectMeta",
    "Workspace",
    "WorkspaceV1alpha1",
    "WorkspaceV1beta1",
]

SERVE_ANNOTATION = "kaito-flows/serve"
GPUS_ANNOTATION = "kaito-flows/gpus"
GUEST_ANNOTATION = "kaito-flows/guest-of"
LOAD_BALANCER_ANNOTATION = "kaito.sh/enablelb"


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


def _lower(value: object) -> object:
    # KAITO's webhook compares the method without case and its controller with case; we take both spellings.
    return value.lower() if isinstance(value, str) else value


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


Method = Annotated[Literal["qlora", "lora"], BeforeValidator(_lower)]


class ObjectMeta(BaseModel):
    """The part of Kubernetes' metadata that kaito-flows reads; whatever else Kubernetes wrote is let through."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="allow")

    name: str = Field(title="Name", description="A DNS-1123 label: lowercase letters, digits and '-', at most 63.")
    namespace: str = Field("default", title="Namespace")
    labels: dict[str, str] = Field(default_factory=dict, title="Labels")
    annotations: dict[str, str] = Field(default_factory=dict, title="Annotations")
    generation: int | None = Field(None, title="Generation", description="Counted by the API server.")


class MatchExpression(_Model):
    """One requirement of a label selector."""

    key: str = Field(title="Key")
    operator: str = Field(title="Operator")
    values: list[str] = Field(default_factory=list, title="Values")


class LabelSelector(_Model):
    """Kubernetes' label selector; KAITO takes `matchLabels` and `In` expressions only."""

    match_labels: dict[str, str] = Field(default_factory=dict, title="Match labels")
    match_expressions: list[MatchExpression] = Field(default_factory=list, title="Match expressions")


class Partition(_Model):
    """A part of a GPU, for inference on own nodes."""

    mode: Literal["mig", "accelerator"] = Field(title="Mode")
    profile: str | None = Field(None, title="Profile")
    count: int = Field(1, ge=1, title="Count")


class ResourceSpec(_Model):
    """Which nodes: how many, of which size, with which labels."""

    count: int = Field(1, ge=1, title="Nodes", description="How many nodes; tuning uses all of them.")
    label_selector: LabelSelector = Field(title="Label selector", description="Labels that the nodes carry.")
    preferred_nodes: list[str] = Field(
        default_factory=list, title="Preferred nodes", description="Deprecated by KAITO."
    )


class ResourceSpecV1alpha1(ResourceSpec):
    """`resource` of v1alpha1, where the size has a default."""

    instance_type: str = Field("Standard_NC24ads_A100_v4", title="Instance type")


class ResourceSpecV1beta1(ResourceSpec):
    """`resource` of v1beta1."""

    instance_type: str = Field("", title="Instance type", description="Empty on own nodes and on this machine.")
    partition: Partition | None = Field(None, title="Partition")


class PresetOptions(_Model):
    """Options of a preset; KAITO has deprecated the image and its pull secrets."""

    image: str = Field("", title="Image")
    image_pull_secrets: list[str] = Field(default_factory=list, title="Image pull secrets")


class PresetOptionsV1beta1(PresetOptions):
    """Options of a preset in v1beta1: also the secret with the key `HF_TOKEN`."""

    model_access_secret: str = Field("", title="Model access secret", description="A Secret with the key HF_TOKEN.")


class PresetSpec(_Model):
    """The model by its preset name."""

    name: str = Field(title="Preset", description="A preset's name, an alias, or a model's repository id.")
    access_mode: Literal["public", "private"] = Field("public", title="Access mode")
    preset_options: PresetOptions = Field(default_factory=PresetOptions, title="Options")


class PresetSpecV1beta1(PresetSpec):
    """The model by its preset name, in v1beta1."""

    preset_options: PresetOptionsV1beta1 = Field(default_factory=PresetOptionsV1beta1, title="Options")


class DataSource(_Model):
    """Where data comes from: exactly one of `urls`, `volumeSource`, `image`."""

    name: str = Field("", title="Name")
    urls: list[str] = Field(default_factory=list, title="URLs")
    volume_source: dict[str, Any] | None = Field(None, title="Volume source")
    image: str = Field("", title="Image", description="An image with the data in /data.")
    image_pull_secrets: list[str] = Field(default_factory=list, title="Image pull secrets")


class DataDestination(_Model):
    """Where the adapter goes: exactly one of `volumeSource`, `image`."""

    volume_source: dict[str, Any] | None = Field(None, title="Volume source")
    image: str = Field("", title="Image")
    image_push_secret: str = Field("", title="Image push secret", description="A Secret of type dockerconfigjson.")


class AdapterSpec(_Model):
    """An adapter that an inference service loads."""

    source: DataSource = Field(title="Source")
    # KAITO's CRD fills the default in. Here it is told whether somebody wrote it: the server offers the adapters with a
    # strength as one more model, all of them at once.
    strength: str = Field(
        "1.0", title="Strength", description="0 to 1, as text; 1 if unset.", json_schema_extra=_without_default
    )


class TuningSpec(_Model):
    """What to tune, how, on which data, and where the adapter goes."""

    preset: PresetSpec = Field(title="Model")
    method: Method = Field(title="Method")
    config: str = Field("", title="Config", description="A ConfigMap with the key training_config.yaml.")
    input: DataSource = Field(title="Input")
    output: DataDestination = Field(title="Output")


class TuningSpecV1beta1(TuningSpec):
    """`tuning` of v1beta1."""

    preset: PresetSpecV1beta1 = Field(title="Model")


class InferenceSpec(_Model):
    """What to serve: a preset or a pod template, with adapters."""

    preset: PresetSpec | None = Field(None, title="Model")
    template: dict[str, Any] | None = Field(None, title="Pod template")
    config: str = Field("", title="Config", description="A ConfigMap with the key inference_config.yaml.")
    adapters: list[AdapterSpec] = Field(default_factory=list, max_length=10, title="Adapters")


class InferenceSpecV1beta1(InferenceSpec):
    """`inference` of v1beta1."""

    preset: PresetSpecV1beta1 | None = Field(None, title="Model")


class _WorkspaceBase(_Model):
    kind: Literal["Workspace"] = Field("Workspace", title="Kind")
    metadata: ObjectMeta = Field(title="Metadata")
    status: dict[str, Any] | None = Field(None, title="Status", description="Written by the controller; not read.")

    @property
    def name(self) -> str:
        """The Workspace's name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """The namespace that is written in it, "" where none is."""
        return self.metadata.namespace if "namespace" in self.metadata.model_fields_set else ""

    @property
    def gpus(self) -> int | None:
        """How many GPUs of a node are to be used, by the annotation `kaito-flows/gpus`; None where it is not set.

        `validation.py` has seen to it that it is a number.
        """
        text = self.metadata.annotations.get(GPUS_ANNOTATION)
        return None if text is None else int(text)

    @property
    def serve(self) -> bool:
        """Whether a tuned adapter is rolled out: yes, unless the annotation `kaito-flows/serve` says "false"."""
        return self.metadata.annotations.get(SERVE_ANNOTATION, "true").lower() != "false"

    @property
    def guest_of(self) -> str:
        """The flow run in another cluster for which this is tuned here, "" where none."""
        return self.metadata.annotations.get(GUEST_ANNOTATION, "")


class WorkspaceV1alpha1(_WorkspaceBase):
    """A Workspace of `kaito.sh/v1alpha1`."""

    api_version: Literal["kaito.sh/v1alpha1"] = Field("kaito.sh/v1alpha1", title="API version")
    resource: ResourceSpecV1alpha1 = Field(title="Resource")
    inference: InferenceSpec | None = Field(None, title="Inference")
    tuning: TuningSpec | None = Field(None, title="Tuning")


class WorkspaceV1beta1(_WorkspaceBase):
    """A Workspace of `kaito.sh/v1beta1`."""

    api_version: Literal["kaito.sh/v1beta1"] = Field("kaito.sh/v1beta1", title="API version")
    resource: ResourceSpecV1beta1 = Field(title="Resource")
    inference: InferenceSpecV1beta1 | None = Field(None, title="Inference")
    tuning: TuningSpecV1beta1 | None = Field(None, title="Tuning")


# No discriminator: Prefect's form shows a plain union as tabs, and one with a discriminator as bare JSON.
Workspace = WorkspaceV1beta1 | WorkspaceV1alpha1
