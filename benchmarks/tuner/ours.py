"""`python -m benchmarks.tuner.ours JOB.json`: the product's tuner as it is, and what its GPU memory was at most."""

from __future__ import annotations

import runpy

from kaito_flows.containers.program import emit

if __name__ == "__main__":
    try:
        runpy.run_module("kaito_flows.containers.tuner", run_name="__main__", alter_sys=True)
    finally:
        from benchmarks.tuner.counting import gpu_memory

        emit("memory", **gpu_memory())
