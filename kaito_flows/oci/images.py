"""Images made of plain files: `FROM scratch`, uncompressed, and the same digest for the same bytes.

Docker, containerd and KAITO's puller take these images; those of others are read too, compressed layers among them.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kaito_flows.canonical import canonical_json
from kaito_flows.errors import ImageError, disk_errors
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.layers import WHITEOUT, Content, Layer, open_layer
from kaito_flows.oci.layout import Layout
from kaito_flows.oci.reference import ImageName
from kaito_flows.oci.repository import MANIFEST_TYPE, Repository
from kaito_flows.oci.unpacking import unpack_member

__all__ = [
    "Content",
    "Image",
    "build_image",
    "extract",
    "find_image",
    "open_image",
    "open_repository",
    "read_file",
    "retag",
]

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
OPAQUE = f"{WHITEOUT}.wh..opq"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a repository: where, which digest, and its annotations."""

    repository: Repository
    digest: str
    annotations: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The image by digest, in the form that `open_image` and skopeo take."""
        return self.repository.reference(self.digest)


def open_repository(text: str, credentials: Credentials | None = None) -> Repository:
    """Return the repository that the text of an image or of a repository names; nothing is asked of it yet.

    Args:
        text: `oci:<folder>` or `docker://<registry>/<repository>`; a tag or a digest behind it says nothing here.
        credentials: for a registry; unset: `Credentials.default()`.

    Raises:
        ImageError: the text is neither.
    """
    name = ImageName.parse(text)
    if name.folder:
        return Layout(Path(name.folder))
    from kaito_flows.oci.registry import RegistryRepository  # brings an HTTP client, which a folder does not need

    return RegistryRepository(name.registry, name.repository, credentials)


def open_image(text: str, credentials: Credentials | None = None) -> Image:
    """Find the image that a text names: `oci:…` or `docker://…`, with a tag or a digest.

    Raises:
        ImageError: the text is not one, or nothing is there.
        AccessError: (`pull-refused`) a registry says no.
        RegistryError: a registry does not answer.
    """
    name = ImageName.parse_image(text)
    return find_image(open_repository(text, credentials), name.reference)


def find_image(repository: Repository, reference: str) -> Image:
    """Find the image behind a tag or a digest; out of an index, the one for linux/amd64, or the only one.

    Raises:
        ImageError: nothing is there, or no image in the index fits.
        AccessError: (`pull-refused`) a registry says no.
        RegistryError: a registry does not answer.
    """
    digest = repository.resolve(reference)
    manifest = repository.manifest(digest)
    if "manifests" in manifest:
        digest = _choose(manifest["manifests"], repository.reference(digest))
        manifest = repository.manifest(digest)
    if "layers" not in manifest:
        raise ImageError("an index inside an index", place=repository.reference(digest), code="image-platform")
    return Image(repository, digest, manifest.get("annotations") or {})


def _choose(entries: Sequence[Mapping[str, Any]], place: str) -> str:
    # Builders put attestations into the index, under a platform that no machine has.
    platforms: dict[str, Mapping[str, str]] = {e["digest"]: e.get("platform") or {} for e in entries}
    real = {d: p for d, p in platforms.items() if p.get("architecture") != "unknown"}
    fitting = [d for d, p in real.items() if (p.get("os"), p.get("architecture")) == ("linux", "amd64")]
    if not fitting and len(real) != 1:
        names = ", ".join(f"{p.get('os')}/{p.get('architecture')}" for p in real.values()) or "nothing"
        hint = f"it has {names}; name the one that you mean by digest"
        raise ImageError("no image for linux/amd64 in the index", place=place, hint=hint, code="image-platform")
    return (fitting or list(real))[0]


def build_image(
    repository: Repository,
    layers: Sequence[Mapping[str, Content]],
    *,
    annotations: Mapping[str, str],
    tag: str | None = None,
) -> Image:
    """Write an image whose layers hold the given files (path inside the image -> a file or bytes).

    Raises:
        DiskFullError: no space left.
        FileNotFoundError: one of the files is not there.
        AccessError: (`push-refused`) a registry says no.
        RegistryError: a registry does not answer.
    """
    descriptors = [repository.put_blob(Layer(files), LAYER_TYPE) for files in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": dict(annotations)},
        "rootfs": {"type": "layers", "diff_ids": [d.digest for d in descriptors]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": repository.put_blob([canonical_json(config)], CONFIG_TYPE).as_dict(),
        "layers": [d.as_dict() for d in descriptors],
        "annotations": dict(annotations),
    }
    descriptor = repository.put_manifest(manifest)
    if tag:
        repository.tag(tag, descriptor)
    return Image(repository, descriptor.digest, dict(annotations))


def retag(image: Image, tag: str) -> None:
    """Let `tag` point at this image, by digest."""
    image.repository.tag(tag, image.repository.descriptor(image.digest))


def read_file(image: Image, path: str) -> bytes:
    """Return the bytes of one file inside the image.

    Raises:
        ImageError: (`file-not-in-image`) no layer holds it; (`image-damaged`).
    """
    for layer in reversed(_layers(image)):
        found, hidden = None, False
        with open_layer(image.repository, layer) as tar:
            for member in tar:
                name = _clean(member.name)
                hidden = hidden or _hides(name, path)
                if name == path:
                    file = tar.extractfile(member) if member.isreg() else None
                    found = file.read() if file else None
        if found is not None:
            return found
        if hidden:
            break
    raise ImageError(f"no file {path!r} in the image", place=image.reference, code="file-not-in-image")


def extract(image: Image, destination: Path, *, only: str = "") -> None:
    """Unpack every layer under `destination`; nothing can be written outside it.

    What a registry sends is verified as it is written: after an `ImageError`, what lies there is not to be trusted.

    Args:
        image: which.
        destination: made if it is not there.
        only: unpack this folder of the image and leave the rest; the images of others may hold a whole system.

    Raises:
        ImageError: (`image-damaged`) a layer is not a tar, not what its digest says, or holds something other than
            plain files, folders and links among them.
        DiskFullError: no space left.
    """
    with disk_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        for layer in _layers(image):
            with open_layer(image.repository, layer) as tar:
                for member in _members(tar, destination, only):
                    unpack_member(tar, member, destination, image.reference)


def _members(tar: tarfile.TarFile, destination: Path, only: str) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        name = _clean(member.name)
        if only and not (name == only or name.startswith(f"{only}/")):
            continue
        folder, _, base = name.rpartition("/")
        if base.startswith(WHITEOUT):
            _remove(destination, folder, base)
        else:
            yield member


def _remove(destination: Path, folder: str, base: str) -> None:
    parent = (destination / folder).resolve()
    gone = base.removeprefix(WHITEOUT)
    if not parent.is_relative_to(destination.resolve()) or gone in ("", ".", ".."):
        return
    for path in parent.glob("*") if base == OPAQUE else [parent / gone]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _hides(name: str, path: str) -> bool:
    """Whether a member of a layer says that `path` is gone from those below it."""
    folder, _, base = name.rpartition("/")
    if not base.startswith(WHITEOUT):
        return False
    gone = PurePosixPath(folder) if base == OPAQUE else PurePosixPath(folder, base.removeprefix(WHITEOUT))
    return PurePosixPath(path).is_relative_to(gone)


def _clean(name: str) -> str:
    return str(PurePosixPath("/", name)).lstrip("/")


def _layers(image: Image) -> list[str]:
    manifest = image.repository.manifest(image.digest)
    return [layer["digest"] for layer in manifest["layers"]]
