"""Taking a model out of an OCI image: from any of its layers, and from whichever folder in it holds `config.json`."""

from __future__ import annotations

import fnmatch
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from kaito_flows.containers.weights.hub import TENSORS, UNWANTED, WANTED
from kaito_flows.containers.weights.job import ImageSource
from kaito_flows.errors import WeightsError, disk_errors
from kaito_flows.oci.images import open_image
from kaito_flows.oci.layers import WHITEOUT, open_layer

__all__ = ["take_model"]

# Likelier first: where two folders hold a model, this says which one is meant.
_FOLDERS = ("workspace/weights", "model", "data", "")


def take_model(source: ImageSource, folder: Path, *, tensors: bool = True) -> None:
    """Put the image's model files into `folder`, without pickles; without `tensors`, what tokenising needs of them.

    Raises:
        ImageError: (code `image-not-found`) no such image; (code `image-damaged`) a layer cannot be read.
        WeightsError: (code `weights-not-found`) no folder in it holds `config.json`.
        AccessError: (code `pull-refused`) the registry wants other credentials.
        RegistryError: the registry does not answer.
        DiskFullError: no space left.
    """
    image = open_image(_reference(source.image))
    unpacked = folder / ".unpacked"
    wanted = WANTED + (TENSORS if tensors else [])
    with disk_errors(folder):
        for layer in image.repository.manifest(image.digest)["layers"]:
            with open_layer(image.repository, layer["digest"]) as tar:
                _apply(tar, unpacked, wanted)
        found = {path.parent.relative_to(unpacked).as_posix() for path in unpacked.rglob("config.json")}
        if not found:
            hint = "the image must hold a Hugging Face folder: config.json, tokenizer.json, *.safetensors"
            raise WeightsError("no config.json in any layer", place=source.image, hint=hint, code="weights-not-found")
        liked = [name for name in (name or "." for name in _FOLDERS) if name in found]
        for path in (unpacked / [*liked, *sorted(found)][0]).iterdir():
            if path.is_file():
                path.rename(folder / path.name)
        shutil.rmtree(unpacked)


def _reference(text: str) -> str:
    return text if text.startswith(("oci:", "docker://")) else f"docker://{text}"


def _apply(tar: tarfile.TarFile, root: Path, wanted: list[str]) -> None:
    """Bring the wanted files of a layer under `root`, over those of the layers below it."""
    for member in tar:
        path = PurePosixPath("/", member.name).relative_to("/")
        if ".." in path.parts:
            continue
        if path.name.startswith(WHITEOUT):
            _hide(root / path)
        elif member.isfile() and _is_wanted(path.name, wanted):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with target.open("wb") as out:
                shutil.copyfileobj(content, out, 1 << 20)


def _is_wanted(name: str, wanted: list[str]) -> bool:
    def matches(patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return matches(wanted) and not matches(UNWANTED)


def _hide(whiteout: Path) -> None:
    """Remove what a whiteout hides: one file or folder or, by `.wh..wh..opq`, all that its folder held."""
    if whiteout.name == ".wh..wh..opq":
        shutil.rmtree(whiteout.parent, ignore_errors=True)
        return
    hidden = whiteout.with_name(whiteout.name.removeprefix(WHITEOUT))
    if hidden.is_dir():
        shutil.rmtree(hidden)
    else:
        hidden.unlink(missing_ok=True)
