"""The machine that this process runs on: its memory, its cores, and an NVIDIA GPU if it has one."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

__all__ = ["Machine", "this_machine"]

NO_GPU = ("", 0, 0.0)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of memory and cores that this process may use; the GPU's name, bytes and capability, or "", 0 and 0."""

    memory: int
    cores: int
    gpu_model: str = ""
    gpu_memory: int = 0
    compute_capability: float = 0.0

    @property
    def device_memory(self) -> int:
        """Bytes on the device that tuning uses: the GPU, or without one the machine."""
        return self.gpu_memory or self.memory

    def __str__(self) -> str:
        if self.gpu_model:
            return f"this machine ({self.gpu_model}, {self.gpu_memory / 2**30:.0f} GiB)"
        return f"this machine ({self.cores} cores, {self.memory / 2**30:.0f} GiB, no GPU)"


@cache
def this_machine() -> Machine:
    """Look at the machine, a container's limit included."""
    memory = psutil.virtual_memory().total
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return Machine(memory, len(psutil.Process().cpu_affinity() or [0]), *_nvidia_gpu())


def _nvidia_gpu() -> tuple[str, int, float]:
    """Name, bytes and compute capability of the first GPU that the driver shows and that CUDA programs may use."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return NO_GPU
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, mebibytes, capability = shown.splitlines()[0].rsplit(",", 2)
        return name.strip(), int(mebibytes) * 2**20, float(capability)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return NO_GPU  # a driver that does not answer is a machine without a GPU
