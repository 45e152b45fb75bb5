"""`python -m kaito_flows.containers.copy JOB.json`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from kaito_flows.containers.copy.job import CopyJob
from kaito_flows.containers.copy.volume import files_of, split, unpack
from kaito_flows.containers.program import emit, run
from kaito_flows.errors import InputError, PreemptedError
from kaito_flows.oci.images import build_image, open_image, open_repository
from kaito_flows.oci.reference import ImageName

__all__ = ["copy"]


def copy(job: CopyJob) -> dict[str, Any]:
    """Pack the folder into the image, or unpack the image into the folder, and return the facts.

    Raises:
        InputError: (`volume-…`) the folder cannot be used.
        ImageError: the image is not there, damaged, or has no `data/`.
        AccessError, RegistryError: the registry says no, or does not answer.
        DiskFullError: no space left.
    """
    return _pack(job) if job.packs else _unpack(job)


def _pack(job: CopyJob) -> dict[str, Any]:
    emit("stage", name="read the volume")
    files = files_of(job.folder)
    repository = open_repository(job.image)
    # What is refused is refused before a long volume is read.
    repository.probe_push()
    size = sum(path.stat().st_size for path in files.values())
    emit("stage", name=f"push {len(files)} files")
    annotations = {"org.opencontainers.image.title": job.workspace}
    try:
        tag = ImageName.parse_image(job.image).reference
        image = build_image(repository, split(files), annotations=annotations, tag=tag)
    except FileNotFoundError as exc:
        hint = "leave the volume alone while it is read"
        raise InputError("the file has gone", place=str(exc.filename), hint=hint, code="volume-changed") from exc
    return {"image": image.reference, "digest": image.digest, "files": len(files), "bytes": size, "reused": False}


def _unpack(job: CopyJob) -> dict[str, Any]:
    emit("stage", name="look for the image")
    image = open_image(job.image)
    emit("stage", name="unpack the image")
    done = unpack(image, job.folder)
    return {"image": image.reference, "digest": image.digest, "reused": not done}


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise PreemptedError("told to stop before all was copied", hint="start it again; layers that arrived are kept")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    run(copy, CopyJob, sys.argv)
