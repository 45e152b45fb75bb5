"""Images made of plain files: `FROM scratch`, uncompressed, and the same digest for the same bytes.

Every layer is a tar with sorted names, mtime 0, owner 0:0 and mode 0644, so that digest and diff id are one hash and
nothing of the machine or the hour gets in. Docker, containerd and KAITO's puller take these images.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from kaito_flows.canonical import canonical_json
from kaito_flows.errors import ImageError, disk_errors
from kaito_flows.oci.layout import MANIFEST_TYPE, Descriptor, Layout
from kaito_flows.oci.reference import LayoutReference

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
CHUNK = 1 << 20

Content = Path | bytes


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a layout: where, which digest, and its annotations."""

    layout: Layout
    digest: str
    annotations: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The image by digest, in the form that `open_image` and skopeo take."""
        return f"oci:{self.layout.root}@{self.digest}"


def build_image(
    layout: Layout,
    layers: Sequence[Mapping[str, Content]],
    *,
    annotations: Mapping[str, str],
    tag: str | None = None,
) -> Image:
    """Write an image whose layers hold the given files (path inside the image -> a file or bytes).

    Raises:
        DiskFullError: no space left.
        FileNotFoundError: one of the files is not there.
    """
    descriptors = [layout.put_blob(_tar(layer), LAYER_TYPE) for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": dict(annotations)},
        "rootfs": {"type": "layers", "diff_ids": [d.digest for d in descriptors]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": layout.put_blob([canonical_json(config)], CONFIG_TYPE).as_dict(),
        "layers": [d.as_dict() for d in descriptors],
        "annotations": dict(annotations),
    }
    descriptor = layout.put_manifest(manifest)
    if tag:
        layout.tag(tag, descriptor)
    return Image(layout, descriptor.digest, dict(annotations))


def open_image(reference: str) -> Image:
    """Find the image that `oci:<folder>:<tag>` or `oci:<folder>@<digest>` names.

    Raises:
        ImageError: the reference is not one, or nothing is there.
    """
    parsed = LayoutReference.parse(reference)
    layout = Layout(parsed.path)
    manifest = layout.manifest(parsed.digest or parsed.tag)
    digest = layout.resolve(parsed.digest or parsed.tag)
    return Image(layout, digest, manifest.get("annotations", {}))


def retag(image: Image, tag: str) -> None:
    """Let `tag` point at this image, by digest."""
    size = image.layout.blob_path(image.digest).stat().st_size
    image.layout.tag(tag, Descriptor(MANIFEST_TYPE, image.digest, size))


def read_file(image: Image, path: str) -> bytes:
    """Return the bytes of one file inside the image.

    Raises:
        ImageError: (code `file-not-in-image`) no layer holds it.
    """
    for layer in reversed(_layers(image)):
        with tarfile.open(layer, "r:") as tar:
            try:
                member = tar.extractfile(path)
            except KeyError:
                continue
            if member is not None:
                return member.read()
    raise ImageError(f"no file {path!r} in the image", place=image.reference, code="file-not-in-image")


def extract(image: Image, destination: Path) -> None:
    """Unpack every layer under `destination`; nothing can be written outside it.

    Raises:
        ImageError: (code `image-damaged`) a layer is not a tar, or holds something other than plain files.
        DiskFullError: no space left.
    """
    with disk_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        for layer in _layers(image):
            try:
                with tarfile.open(layer, "r:*") as tar:
                    tar.extractall(destination, filter="data")
            except tarfile.TarError as exc:
                raise ImageError(str(exc), place=image.reference, code="image-damaged") from exc


def _layers(image: Image) -> list[Path]:
    manifest: dict[str, Any] = image.layout.manifest(image.digest)
    return [image.layout.blob_path(layer["digest"]) for layer in manifest["layers"]]


def _tar(files: Mapping[str, Content]) -> Iterator[bytes]:
    for name in sorted(files):
        content = files[name]
        info = tarfile.TarInfo(str(PurePosixPath(name)))
        info.size = content.stat().st_size if isinstance(content, Path) else len(content)
        info.mode = 0o644
        yield info.tobuf(tarfile.PAX_FORMAT)
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as source:
            yield from _chunks(source)
        yield b"\0" * (-info.size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk
