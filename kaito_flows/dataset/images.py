"""Dataset files out of an OCI image: everything below `/data`, as KAITO has it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from kaito_flows.dataset.download import SourceFile, sha256_of
from kaito_flows.errors import DatasetError, disk_errors
from kaito_flows.oci.images import Image, extract

__all__ = ["files_of_image"]

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")


def files_of_image(image: Image, cache: Path) -> tuple[SourceFile, ...]:
    """Return the files in the image's `data/`, in the order of their paths; an image is unpacked once.

    A file is named by its path alone, so that the same files give the same dataset whichever image they come in.

    Raises:
        DatasetError: (code `dataset-empty`) there is no file below `data/`.
        ImageError: a layer is damaged.
        DiskFullError: no space left.
    """
    folder = cache / f"image-{image.digest.removeprefix('sha256:')[:32]}"
    if not folder.is_dir():
        with disk_errors(folder):
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
            try:
                extract(image, partial, only="data")
                if not folder.is_dir():
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    data = folder / "data"
    paths = sorted(p for p in data.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES) if data.is_dir() else []
    if not paths:
        hint = f"put files that end in {', '.join(SUFFIXES)} into /data of the image"
        raise DatasetError("no data below /data", place=image.reference, hint=hint, code="dataset-empty")
    return tuple(
        SourceFile(f"data/{path.relative_to(data).as_posix()}", path, sha256_of(path), path.stat().st_size)
        for path in paths
    )
