"""What the server's job file says."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kaito_flows.errors import InputError

__all__ = ["COMBINED", "Adapter", "Model", "ServerJob"]

COMBINED = "combined_adapter"
"""The name, as in KAITO's transformers runtime, of all adapters that have a strength, at once."""

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
    """An adapter: the name in requests, its image, and its strength.

    Without an image its files lie in `<root>/mnt/adapter/<name>` already: a volume is mounted there. The strength, 0 to
    1, scales what the adapter adds to the base; None is 1, and leaves it out of the combined one.
    """

    name: str
    image: str | None = None
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class ServerJob:
    """The job file. `quantization` is the QuantizationConfig section that the adapters were trained with.

    After SIGTERM, answers in the making have `grace_seconds` to be finished.

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
    adapters: tuple[Adapter, ...] = ()
    grace_seconds: float = 4.0

    def __post_init__(self) -> None:
        if not Path(self.root).is_absolute():
            raise InputError(f"{self.root!r} is not an absolute path", place="root")
        if not 0 <= self.port <= 65535:
            raise InputError(f"{self.port} is not a port", place="port", hint="0 takes any free one")
        if not self.host:
            raise InputError("is empty", place="host", hint="0.0.0.0 in a pod, 127.0.0.1 on one machine")
        if not 0 <= self.grace_seconds < math.inf:
            raise InputError(f"{self.grace_seconds} is no time to wait", place="grace_seconds")
        for i, adapter in enumerate(self.adapters):
            if adapter.strength is not None and not 0 <= adapter.strength <= 1:
                raise InputError(f"{adapter.strength} is not between 0 and 1", place=f"adapters[{i}].strength")
        names = self.model_names
        places = ["model.preset", *(f"adapters[{i}].name" for i in range(len(self.adapters)))]
        places += ["adapters"] if self.combined else []
        for i, (name, place) in enumerate(zip(names, places, strict=True)):
            if not _NAME.fullmatch(name):
                hint = "letters, digits, '.', '_' and '-'"
                raise InputError(f"{name!r} cannot be a model's name", place=place, hint=hint)
            if name in names[:i]:
                raise InputError(f"two models are named {name!r}", place=place, hint="rename the adapter")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that a request may give: the base first."""
        combined = (COMBINED,) if self.combined else ()
        return (self.model.preset, *(adapter.name for adapter in self.adapters), *combined)

    @property
    def combined(self) -> tuple[str, ...]:
        """The adapters that `combined_adapter` is made of, if it is offered: two or more that have a strength."""
        names = tuple(adapter.name for adapter in self.adapters if adapter.strength is not None)
        return names if len(names) > 1 else ()

    @property
    def weights(self) -> Path:
        """Where the base model's weights lie."""
        return Path(self.root) / "workspace" / "weights"

    @property
    def config_file(self) -> Path:
        """KAITO's `inference_config.yaml`; it need not be there."""
        return Path(self.root) / "mnt" / "config" / "inference_config.yaml"

    def adapter_folder(self, name: str) -> Path:
        """Where an adapter's files lie, as in KAITO's pods."""
        return Path(self.root) / "mnt" / "adapter" / name
