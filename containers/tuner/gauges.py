"""What the process and its GPU show while it trains: memory, utilisation, and how long the process has been there."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from functools import cache
from typing import Any

import psutil
import pynvml
import torch

from kaito_flows.containers.tuner.launch import STARTED

__all__ = ["Gauges", "peaks", "process_seconds"]

INTERVAL_SECONDS = 1.0
"""How often the driver is asked for the utilisation; it has a new number a few times a second."""

_logger = logging.getLogger(__name__)


class Gauges:
    """The gauges of a device, for progress events: nothing of them is part of what a training comes to.

    `gpu_memory_bytes` is what PyTorch has taken of the GPU's memory, used or not, and `gpu_utilization` the percentage
    of the last moments in which the GPU computed (NVML's). On a CPU there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = float("-inf")
        self._utilization: int | None = None

    def read(self) -> dict[str, int]:
        """Return what they show; asking costs microseconds, the driver is asked once a second."""
        if self._device.type != "cuda":
            return {}
        if time.monotonic() >= self._asked + INTERVAL_SECONDS:
            self._asked = time.monotonic()
            self._utilization = _utilization(self._device)
        shown = {"gpu_memory_bytes": torch.cuda.memory_reserved(self._device)}
        return shown if self._utilization is None else {**shown, "gpu_utilization": self._utilization}


def _utilization(device: torch.device) -> int | None:
    try:
        return torch.cuda.utilization(device)
    except (pynvml.NVMLError, RuntimeError) as exc:
        # A slice of a GPU (MIG) has none, and some containers have no NVML.
        _tell_once(str(exc))
        return None


@cache
def _tell_once(reason: str) -> None:
    _logger.warning("the GPU's utilisation is not known: %s", reason)


def process_seconds() -> float:
    """Return how long this process, or the launcher that started it, has been there."""
    return time.time() - float(os.environ.get(STARTED) or psutil.Process().create_time())


def peaks(device: torch.device) -> dict[str, Any]:
    """Return the most memory that the process had so far: `peak_host_bytes`, and where there is a GPU `peak_gpu_bytes`,
    of which its tensors took `peak_gpu_tensor_bytes`.

    The host's counts pages of files too, such as those of weights that are being read.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    host = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type != "cuda":
        return host
    tensors = torch.cuda.max_memory_allocated(device)
    return {**host, "peak_gpu_bytes": torch.cuda.max_memory_reserved(device), "peak_gpu_tensor_bytes": tensors}
