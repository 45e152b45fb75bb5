"""A repository in a registry, over the distribution API (OCI distribution-spec v1.1).

A blob is hashed in one pass and sent in a second, whole; of the ways that were measured this is the fastest. An upload
that broke is never resumed, since registries cannot: what is there is asked for, and the blob is sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import httpx

from kaito_flows.canonical import canonical_json
from kaito_flows.errors import AccessError, ImageError, RegistryError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.repository import INDEX_TYPE, MANIFEST_TYPE, Descriptor, is_digest, read_manifest, verified
from kaito_flows.oci.session import TRANSIENT, Retries, Session

__all__ = ["RegistryRepository"]

MANIFEST_TYPES = (
    MANIFEST_TYPE,
    INDEX_TYPE,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_ACCEPT = {"Accept": ", ".join(MANIFEST_TYPES)}
# Compressed on the way, a blob would not be what its digest says.
_AS_IT_IS = {"Accept-Encoding": "identity"}
_TAGS_A_PAGE = 1000


class RegistryRepository:
    """One repository in a registry; see `Repository` for what each method promises.

    Credentials are looked up anew whenever the registry asks for them.
    """

    def __init__(
        self,
        registry: str,
        repository: str,
        credentials: Credentials | None = None,
        *,
        retries: Retries | None = None,
    ) -> None:
        self.registry, self.repository = registry, repository
        self._session = Session(registry, repository, credentials, retries or Retries())

    def __repr__(self) -> str:
        return f"RegistryRepository({self.registry!r}, {self.repository!r})"

    def reference(self, reference: str) -> str:
        """The image with that tag or digest as the text that `open_image` and skopeo take."""
        return f"docker://{self.registry}/{self.repository}{'@' if is_digest(reference) else ':'}{reference}"

    def put_blob(self, chunks: Iterable[bytes], media_type: str) -> Descriptor:
        """Store the bytes unless they are there, and return their descriptor.

        Args:
            chunks: iterated once to hash, and once more for each time they are sent.
            media_type: for the descriptor.

        Raises:
            ImageError: (`files-changed`) the bytes were others the second time.
        """
        if iter(chunks) is chunks:
            raise TypeError("chunks must be iterable more than once")
        hasher, size = hashlib.sha256(), 0
        for chunk in chunks:
            hasher.update(chunk)
            size += len(chunk)
        descriptor = Descriptor(media_type, f"sha256:{hasher.hexdigest()}", size)
        retries = self._session.retries
        for failures in range(1, retries.attempts + 1):
            if self._has_blob(descriptor.digest) or self._send(chunks, descriptor, last=failures == retries.attempts):
                return descriptor
            retries.wait(failures)
        raise RegistryError("the blob could not be sent", place=self.reference(descriptor.digest))

    def _send(self, chunks: Iterable[bytes], descriptor: Descriptor, *, last: bool) -> bool:
        """Send a blob whole; return whether it arrived. What is not worth another try is raised, and so is the last."""
        place = self.reference(descriptor.digest)
        begun = self._session.request("POST", "blobs/uploads/", "push", headers={"Content-Length": "0"}, place=place)
        url = self._upload(begun)
        # As it is: a registry may have signed what it says here.
        url = httpx.URL(f"{url}{'&' if url.query else '?'}digest={descriptor.digest}")
        headers = {"Content-Length": str(descriptor.size), "Content-Type": "application/octet-stream"}
        try:
            sized = _Sized(chunks, descriptor.size, place)
            answer = self._session.once("PUT", url, "push", headers=headers, content=sized)
        except httpx.TransportError as exc:
            if last:
                raise self._session.unreachable(exc) from exc
            return False
        if answer.is_success:
            return True
        error = self._session.refusal(answer, "push", place)
        if "DIGEST_INVALID" in error.message:
            raise _changed(place) from error
        # 404 and 416: the upload that was begun is no longer known.
        if last or answer.status_code not in (*TRANSIENT, 404, 416):
            raise error
        return False

    def _has_blob(self, digest: str) -> bool:
        answer = self._session.request("HEAD", f"blobs/{digest}", "push", allow=(404,), place=self.reference(digest))
        return answer.is_success

    def _upload(self, begun: httpx.Response) -> httpx.URL:
        location = begun.headers.get("location", "")
        if begun.status_code not in (201, 202) or not location:
            message = f"an upload was begun with {begun.status_code} and no place to go on"
            raise RegistryError(message, place=self._session.place)
        return begun.request.url.join(location)

    def put_manifest(self, manifest: Mapping[str, Any]) -> Descriptor:
        """Store a manifest in canonical JSON and return its descriptor."""
        raw = canonical_json(manifest)
        media_type = manifest.get("mediaType", MANIFEST_TYPE)
        descriptor = Descriptor(media_type, f"sha256:{hashlib.sha256(raw).hexdigest()}", len(raw))
        self._put_manifest(descriptor.digest, raw, media_type)
        return descriptor

    def _put_manifest(self, reference: str, raw: bytes, media_type: str) -> None:
        headers, place = {"Content-Type": media_type}, self.reference(reference)
        self._session.request("PUT", f"manifests/{reference}", "push", headers=headers, content=raw, place=place)

    def manifest(self, reference: str) -> dict[str, Any]:
        """Return the manifest or the index behind a tag or a digest."""
        raw, descriptor = self._get_manifest(reference)
        return read_manifest(raw, self.reference(reference), descriptor.digest)

    def _get_manifest(self, reference: str) -> tuple[bytes, Descriptor]:
        place = self.reference(reference)
        answer = self._session.request("GET", f"manifests/{reference}", "pull", headers=_ACCEPT, place=place)
        told = reference if is_digest(reference) else answer.headers.get("docker-content-digest", "")
        digest = told or f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
        return answer.content, Descriptor(_media_type(answer), digest, len(answer.content))

    def descriptor(self, reference: str) -> Descriptor:
        """Return the descriptor of the manifest behind a tag or a digest."""
        place = self.reference(reference)
        answer = self._session.request("HEAD", f"manifests/{reference}", "pull", headers=_ACCEPT, place=place)
        digest = answer.headers.get("docker-content-digest", "")
        length = answer.headers.get("content-length", "")
        if not (is_digest(digest) and length.isdigit()) or (is_digest(reference) and digest != reference):
            # A HEAD need not tell.
            raw, descriptor = self._get_manifest(reference)
            read_manifest(raw, place, descriptor.digest)
            return descriptor
        return Descriptor(_media_type(answer), digest, int(length))

    def resolve(self, reference: str) -> str:
        """Return the digest behind a tag (or the digest itself), if its manifest is there."""
        return self.descriptor(reference).digest

    def has(self, reference: str) -> bool:
        """Whether the tag or digest, its config and every layer are there."""
        try:
            manifest = self.manifest(reference)
        except ImageError:
            return False
        if "manifests" in manifest:
            return all(self.has(entry["digest"]) for entry in manifest["manifests"])
        blobs = [manifest["config"], *manifest["layers"]]
        return all(self._readable(d["digest"]) for d in blobs)

    def _readable(self, digest: str) -> bool:
        answer = self._session.request("HEAD", f"blobs/{digest}", "pull", allow=(404,), place=self.reference(digest))
        return answer.is_success

    def tag(self, tag: str, descriptor: Descriptor) -> None:
        """Let `tag` point at the manifest; whatever it pointed at before keeps its digest."""
        raw, found = self._get_manifest(descriptor.digest)
        read_manifest(raw, self.reference(descriptor.digest), descriptor.digest)
        self._put_manifest(tag, raw, found.media_type or descriptor.media_type)

    def untag(self, tag: str) -> None:
        """Drop the tag, as far as the registry and the login allow it; what is refused is no error.

        Some registries delete no tags, only manifests by their digest: then the manifest goes, unless another tag
        points at it. Some delete nothing.
        """
        with contextlib.suppress(AccessError, ImageError):
            answer = self._session.request("DELETE", f"manifests/{tag}", "delete", allow=(400, 404, 405, 501))
            if answer.is_success or answer.status_code == 404:
                return
            tags = self.tags()
            digest = tags.pop(tag, "")
            if digest and digest not in tags.values():
                self._session.request("DELETE", f"manifests/{digest}", "delete", allow=(400, 404, 405, 501))

    def tags(self) -> dict[str, str]:
        """Every tag with its digest; one request for each tag, and one for each page of them."""
        found: list[str] = []
        url: str | httpx.URL | None = f"tags/list?n={_TAGS_A_PAGE}"
        while url is not None:
            answer = self._session.request("GET", url, "pull", allow=(404,))
            if answer.status_code == 404:
                break
            found += _names(answer, self._session.place)
            more = answer.links.get("next", {}).get("url")
            url = answer.request.url.join(more) if more else None
        tags = {}
        for tag in found:
            with contextlib.suppress(ImageError):  # dropped meanwhile
                tags[tag] = self.resolve(tag)
        return tags

    @contextlib.contextmanager
    def open_blob(self, digest: str) -> Iterator[BinaryIO]:
        """Open a blob for reading; whoever reads it to its end knows that it is what the digest says."""
        place = self.reference(digest)
        with contextlib.closing(self._download(digest, place)) as chunks:
            yield verified(chunks, digest, place)

    def _download(self, digest: str, place: str) -> Generator[bytes, None, None]:
        """Yield the blob; a connection that is cut is made anew, and goes on where it was."""
        at, failures, retries = 0, 0, self._session.retries
        while True:
            headers = _AS_IT_IS | ({"Range": f"bytes={at}-"} if at else {})
            try:
                with self._session.stream("GET", f"blobs/{digest}", "pull", headers=headers, place=place) as answer:
                    # Whoever knows no ranges begins at the beginning.
                    skip = 0 if answer.status_code == 206 else at
                    for chunk in answer.iter_raw():
                        fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                        if fresh:
                            at, failures = at + len(fresh), 0
                            yield fresh
                return
            except httpx.TransportError as exc:
                failures += 1
                if failures == retries.attempts:
                    raise self._session.unreachable(exc) from exc
            retries.wait(failures)

    def probe_push(self) -> None:
        """Raise now what a push would raise for want of rights: begin an upload, and call it off."""
        begun = self._session.request("POST", "blobs/uploads/", "push", headers={"Content-Length": "0"})
        # Not every registry lets an upload be called off; it then runs out by itself.
        with contextlib.suppress(AccessError):
            self._session.request("DELETE", self._upload(begun), "delete", allow=(400, 404, 405, 501))


class _Sized:
    """Chunks that must be as many bytes as were announced."""

    def __init__(self, chunks: Iterable[bytes], size: int, place: str) -> None:
        self._chunks, self._size, self._place = chunks, size, place

    def __iter__(self) -> Iterator[bytes]:
        left = self._size
        for chunk in self._chunks:
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
        if left:
            raise _changed(self._place)


def _changed(place: str) -> ImageError:
    hint = "start again, and leave them alone meanwhile"
    return ImageError("the files changed while they were sent", place=place, hint=hint, code="files-changed")


def _media_type(answer: httpx.Response) -> str:
    return str(answer.headers.get("content-type", "")).partition(";")[0].strip() or MANIFEST_TYPE


def _names(answer: httpx.Response, place: str) -> list[str]:
    try:
        names = answer.json().get("tags") or []
    except (ValueError, AttributeError) as exc:
        raise RegistryError("the list of tags is not JSON", place=place) from exc
    return [str(name) for name in names]
