"""The machine that the tests run on, and drivers that answer in different ways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kaito_flows.planning import machine as module
from kaito_flows.planning.machine import Machine, this_machine


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The program nvidia-smi, as a script that the test writes; looked at afresh."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    this_machine.cache_clear()
    yield tmp_path / "nvidia-smi"
    this_machine.cache_clear()


def answers(driver: Path, script: str) -> Machine:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(0o755)
    return this_machine()


def test_memory_and_cores_are_those_that_this_process_may_use(driver: Path) -> None:
    found = answers(driver, "exit 9")
    assert 2**28 < found.memory <= psutil.virtual_memory().total
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.device_memory == found.memory
    assert "no GPU" in str(found)


def test_a_containers_limit_counts(driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_CGROUP_LIMIT", limit)
    limit.write_text("1073741824\n")
    assert answers(driver, "exit 9").memory == 2**30
    this_machine.cache_clear()
    limit.write_text("max\n")
    assert this_machine().memory == psutil.virtual_memory().total


def test_a_gpu_is_what_counts_where_there_is_one(driver: Path) -> None:
    found = answers(driver, 'echo "NVIDIA H200, 143771, 9.0"; echo "NVIDIA A10, 23028, 8.6"')
    assert (found.gpu_model, found.gpu_memory, found.compute_capability) == ("NVIDIA H200", 143771 * 2**20, 9.0)
    assert found.device_memory == found.gpu_memory
    assert str(found) == "this machine (NVIDIA H200, 140 GiB)"


@pytest.mark.parametrize(
    "script", ["exit 9", "echo No devices were found", "exit 0", 'echo "NVIDIA T4, [N/A], 7.5"', "exec /none"]
)
def test_a_driver_that_does_not_answer_is_no_gpu(driver: Path, script: str) -> None:
    assert answers(driver, script).gpu_model == ""


def test_a_gpu_that_is_hidden_is_no_gpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert answers(driver, 'echo "NVIDIA H200, 143771, 9.0"').gpu_model == ""
