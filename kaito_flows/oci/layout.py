"""An OCI image layout: the folder form of a repository, with tags (OCI image-spec v1.1, `image-layout.md`).

    <root>/oci-layout                 {"imageLayoutVersion": "1.0.0"}
    <root>/index.json                 the tags: a descriptor each, annotated org.opencontainers.image.ref.name
    <root>/blobs/sha256/<hex>         manifests, configs and layers

Blobs are written to a temporary name, hashed on the way, synced and renamed: a blob that is there is whole.
`skopeo`, `oras`, `crane` and `podman` read the folder as `oci:<root>:<tag>`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kaito_flows.canonical import canonical_json
from kaito_flows.errors import AccessError, ImageError, disk_errors
from kaito_flows.oci.repository import CHUNK, INDEX_TYPE, MANIFEST_TYPE, Descriptor, is_digest, read_manifest, verified

__all__ = ["Layout"]

REF_NAME = "org.opencontainers.image.ref.name"


class Layout:
    """One repository in a folder; see `Repository` for what each method promises.

    Safe for several processes: blobs are content-addressed, and `index.json` is changed under a lock.

    Raises:
        ImageError: (`image-not-found`) a tag or digest is not there; (`image-damaged`) bytes are not what
            their digest says, or a manifest is none.
        DiskFullError: no space left.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"Layout({str(self.root)!r})"

    def blob_path(self, digest: str) -> Path:
        """Where the blob with that digest lies, whether or not it is there."""
        if not is_digest(digest):
            raise ImageError(f"not a sha256 digest: {digest!r}", place=str(self.root))
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def reference(self, reference: str) -> str:
        """The image with that tag or digest as the text that `open_image` and skopeo take."""
        return f"oci:{self.root}{'@' if is_digest(reference) else ':'}{reference}"

    def put_blob(self, chunks: Iterable[bytes], media_type: str) -> Descriptor:
        """Store the bytes and return their descriptor; storing the same bytes again changes nothing."""
        with disk_errors(self.root), self._temporary() as (path, out):
            hasher, size = hashlib.sha256(), 0
            for chunk in chunks:
                hasher.update(chunk)
                out.write(chunk)
                size += len(chunk)
            out.flush()
            os.fsync(out.fileno())
            digest = f"sha256:{hasher.hexdigest()}"
            path.replace(self.blob_path(digest))
        return Descriptor(media_type, digest, size)

    def put_manifest(self, manifest: Mapping[str, Any]) -> Descriptor:
        """Store a manifest in canonical JSON and return its descriptor."""
        return self.put_blob([canonical_json(manifest)], manifest.get("mediaType", MANIFEST_TYPE))

    def manifest(self, reference: str) -> dict[str, Any]:
        """Return the manifest behind a tag or a digest."""
        digest = self.resolve(reference)
        return read_manifest(self.blob_path(digest).read_bytes(), self.reference(digest), digest)

    def descriptor(self, reference: str) -> Descriptor:
        """Return the descriptor of the manifest behind a tag or a digest."""
        digest = self.resolve(reference)
        media_type = self.manifest(digest).get("mediaType", MANIFEST_TYPE)
        return Descriptor(media_type, digest, self.blob_path(digest).stat().st_size)

    @contextlib.contextmanager
    def open_blob(self, digest: str) -> Iterator[BinaryIO]:
        """Open a blob for reading; whoever reads it to its end knows that it is what the digest says."""
        path = self.blob_path(digest)
        if not path.is_file():
            raise ImageError("no such blob in this layout", place=self.reference(digest), code="image-damaged")
        with path.open("rb") as file:
            yield verified(iter(lambda: file.read(CHUNK), b""), digest, self.reference(digest))

    def probe_push(self) -> None:
        """Raise now what a push would raise for want of rights, and leave nothing behind.

        Raises:
            AccessError: (`push-refused`) the folder cannot be written to.
            DiskFullError: no space left.
        """
        try:
            with disk_errors(self.root), self._temporary():
                pass
        except PermissionError as exc:
            raise AccessError("the folder cannot be written to", place=str(self.root), code="push-refused") from exc

    def tag(self, tag: str, descriptor: Descriptor) -> None:
        """Let `tag` point at the manifest; whatever it pointed at before keeps its digest."""
        with self._locked() as index:
            kept = [m for m in index["manifests"] if m.get("annotations", {}).get(REF_NAME) != tag]
            entry = {**descriptor.as_dict(), "annotations": {**descriptor.annotations, REF_NAME: tag}}
            index["manifests"] = sorted([*kept, entry], key=lambda m: (m["annotations"][REF_NAME], m["digest"]))

    def untag(self, tag: str) -> None:
        """Drop the tag, if it is there; blobs stay."""
        with self._locked() as index:
            index["manifests"] = [m for m in index["manifests"] if m.get("annotations", {}).get(REF_NAME) != tag]

    def tags(self) -> dict[str, str]:
        """Every tag with its digest."""
        entries = self._read_index()["manifests"]
        return {m["annotations"][REF_NAME]: m["digest"] for m in entries if REF_NAME in m.get("annotations", {})}

    def resolve(self, reference: str) -> str:
        """Return the digest behind a tag (or the digest itself), if its manifest is there."""
        digest = reference if reference.startswith("sha256:") else self.tags().get(reference, "")
        if not digest or not self.blob_path(digest).is_file():
            raise ImageError(f"no image {reference!r} in this layout", place=str(self.root), code="image-not-found")
        return digest

    def has(self, reference: str) -> bool:
        """Whether the tag or digest, its config and every layer are there."""
        try:
            manifest = self.manifest(reference)
        except ImageError:
            return False
        if "manifests" in manifest:
            return all(self.has(d["digest"]) for d in manifest["manifests"])
        return all(self.blob_path(d["digest"]).is_file() for d in [manifest["config"], *manifest["layers"]])

    def _read_index(self) -> dict[str, Any]:
        path = self.root / "index.json"
        if not path.is_file():
            return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
        index: dict[str, Any] = json.loads(path.read_bytes())
        return index

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                index = self._read_index()
                yield index
                self._replace("oci-layout", {"imageLayoutVersion": "1.0.0"})
                self._replace("index.json", index)

    def _replace(self, name: str, value: dict[str, Any]) -> None:
        with self._temporary() as (path, out):
            out.write(canonical_json(value))
            out.flush()
            os.fsync(out.fileno())
            path.replace(self.root / name)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[Path, Any]]:
        folder = self.root / "blobs" / "sha256"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", dir=folder)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as out:
                yield path, out
        finally:
            path.unlink(missing_ok=True)
