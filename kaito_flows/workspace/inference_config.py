"""KAITO's `inference_config.yaml`: what the server can do of it is honoured, everything else is refused by name.

KAITO hands the section `vllm` to vLLM. Of its options, two say what the service is to its users, and any server can
follow them: `max-model-len` and `dtype`. The others tune vLLM itself. `max_probe_steps` is KAITO's own: how often it
tries for a length that fits; here the plan knows the length, so that only 0, no search, can be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kaito_flows.errors import ConfigError, WorkspaceError
from kaito_flows.workspace.faults import faults_of

__all__ = ["INFERENCE_CONFIG_KEY", "InferenceConfig", "VllmSection"]

INFERENCE_CONFIG_KEY = "inference_config.yaml"

_DTYPES = {"half": "float16", "float": "float32"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class VllmSection(_Section):
    """The options of vLLM that are honoured, as vLLM names them; as there, '_' may stand for '-'."""

    max_model_len: int | None = Field(None, ge=1, alias="max-model-len")
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"


class InferenceConfig(_Section):
    """The whole file; what is left out is for the plan to choose."""

    max_probe_steps: Literal[0] = 0
    vllm: VllmSection = Field(default_factory=VllmSection)

    @property
    def max_model_len(self) -> int | None:
        """The most tokens of a prompt and its answer, if the file says."""
        return self.vllm.max_model_len

    @property
    def torch_dtype(self) -> str:
        """The type of the weights by PyTorch's name; `auto` is bfloat16, as all presets were published."""
        return "bfloat16" if self.vllm.dtype == "auto" else _DTYPES.get(self.vllm.dtype, self.vllm.dtype)

    @classmethod
    def resolve(cls, text: str | None, *, place: str = INFERENCE_CONFIG_KEY) -> InferenceConfig:
        """Read the user's `inference_config.yaml`; None, or an empty one, asks for nothing.

        Raises:
            WorkspaceError: with every fault, each with its path.
            ConfigError: (code `invalid-inference-config`) the text is not YAML, or not a mapping.
        """
        try:
            loaded = yaml.safe_load(text or "")
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            raise ConfigError(f"not YAML: {exc}", place=place, code="invalid-inference-config") from exc
        loaded = {} if loaded is None else loaded
        if not isinstance(loaded, dict):
            hint = "write `vllm:` and below it `max-model-len: 8192`"
            raise ConfigError("not a mapping", place=place, hint=hint, code="invalid-inference-config")
        try:
            return cls.model_validate(
                {key: _dashed(value) if key == "vllm" else value for key, value in loaded.items()}
            )
        except ValidationError as exc:
            raise WorkspaceError(list(faults_of(exc, cls, prefix=f"{place}: "))) from exc


def _dashed(section: Any) -> Any:
    if not isinstance(section, Mapping):
        return {} if section is None else section
    return {str(key).replace("_", "-"): value for key, value in section.items()}
