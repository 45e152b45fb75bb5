"""`inference_config.yaml`: what is honoured, and what is refused by name."""

from __future__ import annotations

import pytest

from kaito_flows.errors import ConfigError, WorkspaceError
from kaito_flows.workspace import InferenceConfig


@pytest.mark.parametrize(
    ("text", "length", "dtype"),
    [
        (None, None, "bfloat16"),
        ("", None, "bfloat16"),
        ("vllm:\n", None, "bfloat16"),
        ("max_probe_steps: 0\nvllm: {max-model-len: 512}", 512, "bfloat16"),
        ("vllm: {max_model_len: 512, dtype: half}", 512, "float16"),
        ("vllm: {dtype: float}", None, "float32"),
    ],
)
def test_length_and_type_are_honoured(text: str | None, length: int | None, dtype: str) -> None:
    config = InferenceConfig.resolve(text)
    assert (config.max_model_len, config.torch_dtype) == (length, dtype)


# KAITO's own template, which its users copy.
KAITOS = """\
max_probe_steps: 6
vllm:
  cpu-offload-gb: 0
  swap-space: 4
  gpu-memory-utilization: 0.84
  max-model-len: 2048
"""


def test_every_option_that_only_vllm_has_is_named() -> None:
    with pytest.raises(WorkspaceError) as caught:
        InferenceConfig.resolve(KAITOS, place="ConfigMap/c")
    paths = {fault.path for fault in caught.value.faults}
    assert paths == {f"ConfigMap/c: {key}" for key in (
        "max_probe_steps", "vllm.cpu-offload-gb", "vllm.swap-space", "vllm.gpu-memory-utilization",
    )}  # fmt: skip


def test_a_misspelt_key_hears_of_the_nearest() -> None:
    with pytest.raises(WorkspaceError) as caught:
        InferenceConfig.resolve("vllm: {max-model-length: 512}")
    assert caught.value.faults[0].hint == 'did you mean "max-model-len"?'


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InferenceConfig.resolve(text)
    assert caught.value.code == "invalid-inference-config"


@pytest.mark.parametrize("text", ["vllm: 5", "vllm: {max-model-len: 0}", "vllm: {dtype: int4}", "transformers: {}"])
def test_a_value_that_cannot_be_had_is_refused(text: str) -> None:
    with pytest.raises(WorkspaceError):
        InferenceConfig.resolve(text)
