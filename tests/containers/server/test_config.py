"""`inference_config.yaml` in a pod: what is honoured, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaito_flows.containers.program import read_job
from kaito_flows.containers.server.config import InferenceConfig, read_config
from kaito_flows.containers.server.job import ServerJob
from kaito_flows.errors import ConfigError

from .conftest import CONTEXT, write_job


@pytest.fixture
def job(weights: Path, tmp_path: Path) -> ServerJob:
    return read_job(write_job(tmp_path, weights, {}), ServerJob)


def read(job: ServerJob, text: str) -> InferenceConfig:
    job.config_file.parent.mkdir(parents=True)
    job.config_file.write_text(text)
    return read_config(job)


def test_without_a_file_nothing_is_asked_for(job: ServerJob) -> None:
    config = read_config(job)
    assert (config.max_model_len, config.torch_dtype) == (None, None)


@pytest.mark.parametrize(
    ("text", "length", "dtype"),
    [
        ("", None, None),
        ("vllm:\n", None, None),
        ("vllm: {max-model-len: 512}\nmax_probe_steps: 0\n", 512, None),
        ("vllm: {max_model_len: 512, dtype: half}", 512, "float16"),
        ("vllm: {dtype: auto}", None, None),
        ("vllm: {dtype: bfloat16}", None, "bfloat16"),
        (f"vllm: {{max-model-len: {CONTEXT}}}", CONTEXT, None),
    ],
)
def test_length_and_type_are_honoured(job: ServerJob, text: str, length: int | None, dtype: str | None) -> None:
    config = read(job, text)
    assert (config.max_model_len, config.torch_dtype) == (length, dtype)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vllm: {gpu-memory-utilization: 0.95}", 'vllm: unknown key "gpu_memory_utilization"'),
        ("vllm: {max-model-length: 5}", 'did you mean "max_model_len"?'),
        ("vllm: {port: 5001}", "this server takes vllm.max-model-len, vllm.dtype"),
        ("vllm: {max-model-len: many}", "vllm.max_model_len: must be an integer"),
        ("vllm: {max-model-len: 0}", "0 tokens are none"),
        (f"vllm: {{max-model-len: {CONTEXT + 1}}}", f"{CONTEXT + 1} tokens; tiny-phi3 reads {CONTEXT}"),
        ("vllm: {dtype: int4}", "vllm.dtype: must be one of"),
        ("vllm: 5", "vllm: must be a mapping"),
        ("max_probe_steps: 6", "max_probe_steps: must be 0, not 6"),
        ("transformers: {}", 'unknown key "transformers"'),
        ("just words", "must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_this_server_cannot_do_is_refused_by_name(job: ServerJob, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(job, text)
    assert said in str(caught.value)
    assert (caught.value.code, caught.value.job_exit_code) == ("invalid-inference-config", 10)
    assert str(job.config_file) in caught.value.place
