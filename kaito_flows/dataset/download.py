"""Fetch the files of a dataset: in parallel, resumed where a connection broke, and not again while nothing changed.

    <cache>/<key>.data    the file            key: the first 32 hex digits of the URL's sha256
    <cache>/<key>.json    what the server said of it (etag, last_modified), and its sha256 and size
    <cache>/<key>.lock    held while one process fetches that URL; others wait, then ask the server only what is new

A file is written beside its place, hashed on the way, synced and renamed: a break leaves the old file, or none.
"""

from __future__ import annotations

import contextlib
import email.utils
import fcntl
import hashlib
import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

import httpx

from kaito_flows.dataset.urls import local_path
from kaito_flows.errors import DatasetError, disk_errors
from kaito_flows.urls import public_url

Progress = Callable[[str, int, int | None], None]
"""Called with the public URL, the bytes so far, and the size (None where the server does not tell); from any thread."""

_Result = TypeVar("_Result")

LONGEST_WAIT = 300.0
_RETRIED = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a dataset, here and whole: its URL without secrets, where it lies, sha256 (64 hex), size in bytes."""

    url: str
    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a request is tried without any progress, and the first wait in seconds (it doubles each time)."""

    attempts: int = 6
    backoff: float = 0.5


def fetch(
    urls: Sequence[str],
    cache: Path,
    *,
    allow_files: bool,
    workers: int = 8,
    on_progress: Progress | None = None,
    patience: Patience | None = None,
) -> tuple[SourceFile, ...]:
    """Return the files behind the URLs, in their order; files that the cache holds unchanged are not fetched again.

    `file://` URLs are used where they lie, if `allow_files`. The first failure stops all downloads.

    Raises:
        DatasetError: `dataset-url` (not a URL that can be fetched), `dataset-not-found`, `dataset-forbidden`,
            `dataset-refused`, `dataset-unreachable`, `dataset-is-html`, `dataset-empty`.
        DiskFullError: no space left.
    """
    report = on_progress or (lambda url, done, total: None)

    def one(client: httpx.Client, url: str, stop: threading.Event) -> SourceFile:
        if urlsplit(url).scheme == "file":
            return _local(url, report)
        with disk_errors(cache):
            return _Download(client, url, cache, patience or Patience(), stop, report).run()

    return _each(urls, one, allow_files, workers)


def probe(
    urls: Sequence[str], *, allow_files: bool, workers: int = 8, patience: Patience | None = None
) -> tuple[int | None, ...]:
    """Return the size in bytes of the file behind each URL (None where the server does not tell); fetch none of them.

    Raises:
        DatasetError: as `fetch` would.
    """

    def one(client: httpx.Client, url: str, stop: threading.Event) -> int | None:
        if urlsplit(url).scheme == "file":
            size = local_path(url).stat().st_size
            if not size:
                raise _empty(public_url(url))
            return size
        return _probe(client, url, patience or Patience(attempts=3), stop)

    return _each(urls, one, allow_files, workers)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as 64 hex digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _each(
    urls: Sequence[str],
    one: Callable[[httpx.Client, str, threading.Event], _Result],
    allow_files: bool,
    workers: int,
) -> tuple[_Result, ...]:
    for url in urls:
        _check_url(url, allow_files)
    stop = threading.Event()
    timeout = httpx.Timeout(60.0, connect=15.0)
    with httpx.Client(follow_redirects=True, timeout=timeout) as client, ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(one, client, url, stop) for url in urls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in errors:
            if not isinstance(error, _Stopped):
                raise error
        return tuple(future.result() for future in futures)


def _check_url(url: str, allow_files: bool) -> None:
    place = public_url(url)
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as exc:
        raise DatasetError(f"not a URL: {exc}", place=place, code="dataset-url") from exc
    if parts.scheme == "file":
        if not allow_files:
            hint = "use an http or https URL that the cluster can reach"
            raise DatasetError("file URLs are not allowed here", place=place, hint=hint, code="dataset-url")
        local_path(url)
    elif parts.scheme not in ("http", "https") or not host:
        accepted = "http, https" + (" or file:///absolute/path" if allow_files else "")
        raise DatasetError("not a URL that can be fetched", place=place, hint=f"use {accepted}", code="dataset-url")


def _local(url: str, report: Progress) -> SourceFile:
    path, place = local_path(url), public_url(url)
    try:
        size, digest = path.stat().st_size, sha256_of(path)
        with path.open("rb") as source:
            _refuse_html(source.read(512), place)
    except PermissionError as exc:
        hint = "make the file readable"
        raise DatasetError("permission denied", place=place, hint=hint, code="dataset-forbidden") from exc
    if not size:
        raise _empty(place)
    report(place, size, size)
    return SourceFile(place, path, digest, size)


class _Stopped(Exception):
    """Another URL failed: give up quietly."""


class _AgainError(Exception):
    """This try failed in a way that another one may not; `wait`: the seconds that the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@contextlib.contextmanager
def _transport_errors(place: str) -> Iterator[None]:
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
        raise DatasetError("not a URL that can be fetched", place=place, code="dataset-url") from exc
    except httpx.TooManyRedirects as exc:
        raise DatasetError("too many redirects", place=place, code="dataset-unreachable") from exc
    except (httpx.TransportError, httpx.DecodingError) as exc:
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                message = f"the server's certificate is not trusted: {cause.verify_message}"
                hint = "set SSL_CERT_FILE to your organisation's certificates"
                raise DatasetError(message, place=place, hint=hint, code="dataset-unreachable") from exc
            cause = cause.__cause__ or cause.__context__
        raise _AgainError(str(exc) or type(exc).__name__) from exc


def _check_status(response: httpx.Response, place: str) -> None:
    """Return if the status is a success; raise `_AgainError` where trying again may help, else `DatasetError`."""
    status = response.status_code
    if response.is_success or status == 304:
        return
    said = f"the server answered {status} {response.reason_phrase}".rstrip()
    if status in _RETRIED or status >= 500:
        raise _AgainError(said, _retry_after(response))
    if status in (404, 410):
        hint = "check the URL: is the file still there?"
        raise DatasetError(said, place=place, hint=hint, code="dataset-not-found")
    if status in (401, 403):
        hint = "the URL needs rights that it does not carry, or its signature has expired"
        raise DatasetError(said, place=place, hint=hint, code="dataset-forbidden")
    raise DatasetError(said, place=place, code="dataset-refused")


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that `Retry-After` asks for (RFC 9110 §10.2.3: seconds, or a date)."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _pause(failures: int, reason: _AgainError, place: str, patience: Patience, stop: threading.Event) -> None:
    """Wait before the next try, or raise `DatasetError` when there is none."""
    if failures >= patience.attempts:
        message = f"{reason}; tried {failures} times"
        hint = "is the server up, and reachable from here?"
        raise DatasetError(message, place=place, hint=hint, code="dataset-unreachable") from reason
    seconds = patience.backoff * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
    if reason.wait is not None:
        if reason.wait > LONGEST_WAIT:
            message = f"{reason}, and asks to wait {reason.wait:.0f} s"
            raise DatasetError(message, place=place, hint="try again later", code="dataset-unreachable") from reason
        seconds = reason.wait
    if stop.wait(min(seconds, LONGEST_WAIT)):
        raise _Stopped


def _empty(place: str) -> DatasetError:
    return DatasetError("the file is empty", place=place, hint="was it written to its end?", code="dataset-empty")


def _html(place: str) -> DatasetError:
    hint = "use the link to the file itself: on the Hugging Face Hub /resolve/ instead of /blob/, or add ?download=true"
    return DatasetError("this is a web page, not data", place=place, hint=hint, code="dataset-is-html")


def _refuse_html(head: bytes, place: str) -> None:
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise _html(place)


def _refuse_html_type(response: httpx.Response, place: str) -> None:
    if response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/html":
        raise _html(place)


def _content_range(response: httpx.Response) -> tuple[int, int | None]:
    """Return first byte and whole size out of `Content-Range: bytes 10-99/100` (-1 where it cannot be read)."""
    unit, _, value = response.headers.get("content-range", "").partition(" ")
    span, _, total = value.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdecimal():
        return -1, None
    return int(first), int(total) if total.isdecimal() else None


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the cache knows of a file."""

    url: str
    etag: str
    last_modified: str
    sha256: str
    size: int


class _Download:
    """One URL on its way into the cache."""

    def __init__(
        self, client: httpx.Client, url: str, cache: Path, patience: Patience, stop: threading.Event, report: Progress
    ) -> None:
        key = hashlib.sha256(url.encode()).hexdigest()[:32]
        self.client, self.url, self.place = client, url, public_url(url)
        self.patience, self.stop, self.report = patience, stop, report
        self.data, self.sidecar = cache / f"{key}.data", cache / f"{key}.json"
        self.lock, self.partial = cache / f"{key}.lock", cache / f"{key}.partial"
        self.written = cache / f"{key}.json.partial"
        # What has been received of the file, and by which validator the server can tell that it is still the same file.
        self.received = 0
        self.hasher = hashlib.sha256()
        self.validator = ""

    def run(self) -> SourceFile:
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            known = self._known()
            try:
                entry = self._try_until_whole(known)
            finally:
                self.partial.unlink(missing_ok=True)
                self.written.unlink(missing_ok=True)
        return SourceFile(self.place, self.data, entry.sha256, entry.size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.lock.open("w") as lock:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if self.stop.wait(0.1):
                    raise _Stopped
            yield

    def _known(self) -> _Entry | None:
        """Return what the cache holds, if the file is still what its sidecar says."""
        try:
            raw = json.loads(self.sidecar.read_bytes())
            entry = _Entry(**raw)
            whole = self.data.stat().st_size == entry.size and sha256_of(self.data) == entry.sha256
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return entry if whole else None

    def _try_until_whole(self, known: _Entry | None) -> _Entry:
        failures, furthest = 0, 0
        while True:
            try:
                with self.partial.open("r+b" if self.received else "wb") as out, _transport_errors(self.place):
                    entry = self._request(known, out)
                if entry is not known:
                    self._keep(entry)
                return entry
            except _AgainError as exc:
                # A connection that breaks again and again, but each time later in the file, is slow and not down.
                failures = 1 if self.received > furthest else failures + 1
                furthest = max(furthest, self.received)
                _pause(failures, exc, self.place, self.patience, self.stop)

    def _request(self, known: _Entry | None, out: IO[bytes]) -> _Entry:
        """Ask once: write what comes, and return the whole file's entry (`known` itself when nothing has changed)."""
        if not self.validator:
            self.received = 0
        headers = {"Accept-Encoding": "identity"}
        if self.received:
            headers |= {"Range": f"bytes={self.received}-", "If-Range": self.validator}
        elif known:
            headers |= {"If-None-Match": known.etag} if known.etag else {}
            headers |= {"If-Modified-Since": known.last_modified} if known.last_modified else {}
        with self.client.stream("GET", self.url, headers=headers) as response:
            if response.status_code == 416:
                self.validator = ""
                raise _AgainError("the server has less of the file than it sent before")
            _check_status(response, self.place)
            if response.status_code == 304 and known:
                self.report(self.place, known.size, known.size)
                return known
            _refuse_html_type(response, self.place)
            total = self._start(response)
            out.seek(self.received)
            out.truncate()
            for chunk in response.iter_bytes():
                if self.stop.is_set():
                    raise _Stopped
                if not self.received:
                    _refuse_html(chunk[:512], self.place)
                out.write(chunk)
                self.hasher.update(chunk)
                self.received += len(chunk)
                self.report(self.place, self.received, total)
            if total is not None and self.received != total:
                self.validator = ""
                raise _AgainError(f"{self.received} bytes came where {total} were announced")
            if not self.received:
                raise _empty(self.place)
            out.flush()
            os.fsync(out.fileno())
            etag, modified = response.headers.get("etag", ""), response.headers.get("last-modified", "")
            return _Entry(self.place, etag, modified, self.hasher.hexdigest(), self.received)

    def _start(self, response: httpx.Response) -> int | None:
        """Set `received` to where this response begins, and return the whole file's size."""
        if response.status_code == 206 and self.received:
            first, total = _content_range(response)
            if first != self.received:
                self.validator = ""
                raise _AgainError("the server sent another part of the file than it was asked for")
            return total
        if response.status_code != 200:
            raise _AgainError(f"the server answered {response.status_code}")
        self.received, self.hasher = 0, hashlib.sha256()
        encoded = response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity")
        etag = response.headers.get("etag", "")
        # A weak validator says "much the same", which is not enough to join two halves (RFC 9110 §13.1.5).
        strong = etag if not etag.startswith("W/") else ""
        self.validator = "" if encoded else strong or response.headers.get("last-modified", "")
        length = response.headers.get("content-length", "")
        return int(length) if length.isdecimal() and not encoded else None

    def _keep(self, entry: _Entry) -> None:
        self.partial.replace(self.data)
        self.written.write_text(json.dumps(asdict(entry)))
        self.written.replace(self.sidecar)


def _probe(client: httpx.Client, url: str, patience: Patience, stop: threading.Event) -> int | None:
    place, failures = public_url(url), 0
    while True:
        try:
            with _transport_errors(place):
                return _ask_size(client, url, place)
        except _AgainError as exc:
            failures += 1
            _pause(failures, exc, place, patience, stop)


def _ask_size(client: httpx.Client, url: str, place: str) -> int | None:
    identity = {"Accept-Encoding": "identity"}
    head = client.head(url, headers=identity)
    if head.is_success and head.headers.get("content-length", "").isdecimal():
        _refuse_html_type(head, place)
        return _size(int(head.headers["content-length"]), place)
    # Not every server has HEAD, and a signed URL is often signed for GET alone: ask for the first bytes.
    with client.stream("GET", url, headers={**identity, "Range": "bytes=0-511"}) as response:
        if response.status_code == 416:
            raise _empty(place)
        _check_status(response, place)
        _refuse_html_type(response, place)
        first = next(response.iter_bytes(512), b"")
        _refuse_html(first, place)
        if not first:
            raise _empty(place)
        if response.status_code == 206:
            return _content_range(response)[1]
        length = response.headers.get("content-length", "")
        return int(length) if length.isdecimal() else None


def _size(size: int, place: str) -> int:
    if not size:
        raise _empty(place)
    return size
