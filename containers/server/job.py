"""What the server's job file says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kaito_flows.errors import InputError

__all__ = ["Adapter", "Model", "ServerJob"]

# A name becomes a folder under /mnt/adapter and a model name in requests.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


@dataclass(frozen=True, slots=True)
class Model:
    """The base model: its preset's name (the name in requests), its id on the Hub, and the revision."""

    preset: str
    id: str
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter: the name in requests, and its image (`oci:<folder>@<digest>` or `oci:<folder>:<tag>`)."""

    name: str
    image: str


@dataclass(frozen=True, slots=True)
class ServerJob:
    """The job file. `quantization` is the QuantizationConfig section that the adapters were trained with.

    Raises:
        InputError: a value that cannot be used, with its key.
    """

    version: Literal[1]
    workspace: str
    root: str
    host: str
    port: int
    model: Model
    torch_dtype: Literal["bfloat16", "float16", "float32"]
    quantization: dict[str, Any] | None
    adapters: tuple[Adapter, ...]

    def __post_init__(self) -> None:
        if not Path(self.root).is_absolute():
            raise InputError(f"{self.root!r} is not an absolute path", place="root")
        if not 0 <= self.port <= 65535:
            raise InputError(f"{self.port} is not a port", place="port", hint="0 takes any free one")
        if not self.host:
            raise InputError("is empty", place="host", hint="0.0.0.0 in a pod, 127.0.0.1 on one machine")
        names = self.model_names
        places = ("model.preset", *(f"adapters[{i}].name" for i in range(len(self.adapters))))
        for i, (name, place) in enumerate(zip(names, places, strict=True)):
            if not _NAME.fullmatch(name):
                hint = "letters, digits, '.', '_' and '-'"
                raise InputError(f"{name!r} cannot be a model's name", place=place, hint=hint)
            if name in names[:i]:
                raise InputError(f"two models are named {name!r}", place=place, hint="rename the adapter")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that a request may give: the base first."""
        return (self.model.preset, *(adapter.name for adapter in self.adapters))

    @property
    def weights(self) -> Path:
        """Where the base model's weights lie."""
        return Path(self.root) / "workspace" / "weights"

    def adapter_folder(self, name: str) -> Path:
        """Where an adapter's files lie, as in KAITO's pods."""
        return Path(self.root) / "mnt" / "adapter" / name
