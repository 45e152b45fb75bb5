"""KAITO's `inference_config.yaml`: what this server can do of it, and nothing that it would pass over in silence.

    max_probe_steps: 0        KAITO's search for a length that fits; here the plan knows it, so only 0, no search
    vllm:
      max-model-len: 8192     the longest prompt and answer together
      dtype: bfloat16         or auto, float16 (half), float32 (float)

As vLLM does, keys are taken with '-' and with '_'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from kaito_flows.containers.program import strict
from kaito_flows.containers.server.job import ServerJob
from kaito_flows.errors import ConfigError

__all__ = ["InferenceConfig", "VllmSection", "read_config"]

_DTYPES = {"half": "float16", "float": "float32"}
_CODE = "invalid-inference-config"
_HINT = "this server takes vllm.max-model-len, vllm.dtype, and max_probe_steps: 0"


@dataclass(frozen=True, slots=True)
class VllmSection:
    """The section that KAITO hands to vLLM."""

    max_model_len: int | None = None
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    """The whole file."""

    max_probe_steps: Literal[0] = 0
    vllm: VllmSection = field(default_factory=VllmSection)

    @property
    def max_model_len(self) -> int | None:
        """The most tokens of a prompt and its answer; None is as many as the model reads."""
        return self.vllm.max_model_len

    @property
    def torch_dtype(self) -> str | None:
        """The type of the weights, by PyTorch's name; None leaves it to the job."""
        return None if self.vllm.dtype == "auto" else _DTYPES.get(self.vllm.dtype, self.vllm.dtype)


def read_config(job: ServerJob) -> InferenceConfig:
    """Read the job's `inference_config.yaml`; without a file nothing is asked for.

    Raises:
        ConfigError: (code `invalid-inference-config`) it is not YAML, or asks for something that this server cannot do.
    """
    path = job.config_file
    if not path.is_file():
        return InferenceConfig()
    try:
        raw = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"not YAML: {exc}", place=str(path), code=_CODE) from exc
    try:
        config = strict(InferenceConfig, _plain({} if raw is None else raw), place=str(path), error=ConfigError)
    except ConfigError as exc:
        raise ConfigError(exc.message, place=exc.place, hint=exc.hint or _HINT, code=_CODE) from None
    asked, longest = config.max_model_len, _context_length(job)
    place = f"{path}: vllm.max-model-len"
    if asked is not None and asked < 1:
        raise ConfigError(f"{asked} tokens are none", place=place, code=_CODE)
    if asked is not None and longest is not None and asked > longest:
        message = f"{asked} tokens; {job.model.preset} reads {longest}"
        raise ConfigError(message, place=place, hint=f"write {longest} or less", code=_CODE)
    return config


def _plain(value: Any) -> Any:
    """The mapping with the keys of its sections as Python has them."""
    if not isinstance(value, dict):
        return value
    return {str(key).replace("-", "_"): _plain(inner if inner is not None else {}) for key, inner in value.items()}


def _context_length(job: ServerJob) -> int | None:
    """The tokens that the model reads, by its `config.json`, where that says it in the usual place."""
    shape = json.loads((job.weights / "config.json").read_bytes())
    longest = shape.get("text_config", shape).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None
