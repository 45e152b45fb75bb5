"""A registry that fails in the ways real ones do: what can be done again is, and nothing secret goes astray."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.errors import AccessError, ImageError, RegistryError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image, extract, find_image, read_file
from kaito_flows.oci.registry import RegistryRepository
from kaito_flows.oci.session import Retries, is_plain

from .conftest import Server, serve

QUICK = Retries(attempts=4, first_seconds=0.01, longest_seconds=2)
WEIGHTS = {"data/weights": b"w" * 3_000_000}


class Faulty(BaseHTTPRequestHandler):
    """The distribution API over a dict; `faults` says what goes wrong the next times that a request matches."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    faults: list[tuple[str, str, Any]]
    """(method, pattern of the path, what happens): a status, `(status, headers)`, or "cut"; each happens once."""
    storage = ""

    def _handle(self) -> None:
        body = self._body()
        facts: Server = self.server.facts  # type: ignore[attr-defined] # set by `serve`
        facts.asked.append({"method": self.command, "path": self.path, "headers": dict(self.headers), "body": body})
        for fault in self.faults:
            if fault[0] == self.command and re.search(fault[1], self.path):
                self.faults.remove(fault)
                self._fail(fault[2])
                return
        getattr(self, f"on_{self.command.lower()}")(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if any(f[:1] == (self.command,) and f[2] == "cut" and re.search(f[1], self.path) for f in self.faults):
            return self.rfile.read(length // 2)
        return self.rfile.read(length)

    def _fail(self, what: Any) -> None:
        if what == "cut":
            if self.command == "GET":
                blob = self.blobs[self.path.rpartition("/")[2]]
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                self.reply(206 if start else 200, blob[start : start + len(blob) // 3], length=len(blob) - start)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, headers = what if isinstance(what, tuple) else (what, {})
            self.reply(status, b"<html>busy</html>", headers)

    def on_get(self, _: bytes) -> None:
        blob = self.blobs.get(self.path.rpartition("/")[2])
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if blob is None:
            self.reply(404, b'{"errors":[{"code":"NOT_THERE","message":"not there"}]}')
        elif self.storage and "/blobs/" in self.path:
            self.reply(307, b"", {"Location": f"http://{self.storage}{self.path}"})
        else:
            types = {b"{": json.loads(blob).get("mediaType", "text/plain")} if blob[:1] == b"{" else {}
            self.reply(206 if start else 200, blob[start:], {"Content-Type": types.get(blob[:1], "x/y")})

    on_head = on_get

    def on_post(self, _: bytes) -> None:
        self.reply(202, b"", {"Location": "/upload/1?state=a+b%2Fc"})

    def on_put(self, body: bytes) -> None:
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if self.path.startswith("/upload/") and not self.path.endswith(f"?state=a+b%2Fc&digest={digest}"):
            self.reply(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
        else:
            self.blobs[digest] = self.blobs[self.path.rpartition("/")[2]] = body
            self.reply(201, b"")

    def on_delete(self, _: bytes) -> None:
        self.reply(405, b"")

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def faulty() -> type[Faulty]:
    return type("FaultyOfThisTest", (Faulty,), {"blobs": {}, "faults": []})


@pytest.fixture
def server(faulty: type[Faulty]) -> Iterator[Server]:
    with serve(faulty) as facts:
        yield facts


@pytest.fixture
def repository(server: Server) -> RegistryRepository:
    raw = json.dumps({"auths": {server.host: {"username": "jane", "password": "hunter2"}}}).encode()
    return RegistryRepository(server.host, "team/x", Credentials.from_dockerconfig(raw), retries=QUICK)


def asked(server: Server, method: str, pattern: str = "") -> list[dict[str, Any]]:
    return [a for a in server.asked if a["method"] == method and re.search(pattern, a["path"])]


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize(
    ("method", "path"), [("HEAD", "blobs/"), ("POST", "uploads/"), ("PUT", "upload/"), ("PUT", "manifests/")]
)
def test_a_push_survives_what_passes(
    faulty: type[Faulty], server: Server, repository: RegistryRepository, method: str, path: str, status: int
) -> None:
    faulty.faults += [(method, path, status)] * 2
    image = build_image(repository, [WEIGHTS], annotations={}, tag="latest")
    assert not faulty.faults
    assert read_file(image, "data/weights") == WEIGHTS["data/weights"]


def test_a_push_whose_connection_is_cut_sends_the_whole_blob_again(
    faulty: type[Faulty], server: Server, repository: RegistryRepository
) -> None:
    faulty.faults += [("PUT", "upload/", "cut")]
    blob = repository.put_blob([b"w" * 3_000_000], "text/plain")
    assert faulty.blobs[blob.digest] == b"w" * 3_000_000
    # It asks whether the blob is there, and begins a new upload.
    assert [(a["method"], len(a["body"])) for a in server.asked] == [
        ("HEAD", 0), ("POST", 0), ("PUT", 1_500_000), ("HEAD", 0), ("POST", 0), ("PUT", 3_000_000)
    ]  # fmt: skip


def test_a_blob_that_arrived_although_the_answer_did_not_is_not_sent_again(
    faulty: type[Faulty], server: Server, repository: RegistryRepository
) -> None:
    faulty.faults += [("PUT", "upload/", "cut")]
    faulty.blobs["sha256:" + hashlib.sha256(b"abc").hexdigest()] = b"abc"
    faulty.faults += [("HEAD", "blobs/", 404)]
    repository.put_blob([b"abc"], "text/plain")
    assert [a["method"] for a in server.asked] == ["HEAD", "POST", "PUT", "HEAD"]


def test_a_pull_whose_connection_is_cut_goes_on_where_it_was(
    faulty: type[Faulty], server: Server, repository: RegistryRepository, tmp_path: Path
) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    faulty.faults += [("GET", "blobs/", "cut")] * 2
    extract(image, tmp_path)
    assert (tmp_path / "data/weights").read_bytes() == WEIGHTS["data/weights"]
    ranges = [a["headers"].get("Range") for a in asked(server, "GET", "blobs/")]
    size = repository.manifest(image.digest)["layers"][0]["size"]
    assert ranges == [None, f"bytes={size // 3}-", f"bytes={size // 3 * 2}-"]


def test_a_registry_that_asks_for_patience_gets_it(
    faulty: type[Faulty], server: Server, repository: RegistryRepository
) -> None:
    faulty.faults += [("HEAD", "manifests/", (429, {"Retry-After": "1"}))]
    begun = time.monotonic()
    with pytest.raises(ImageError, match="image-not-found"):
        repository.resolve("latest")
    assert 1 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("status", [503, "cut"])
def test_what_does_not_pass_is_told_in_one_line(
    faulty: type[Faulty], repository: RegistryRepository, status: Any
) -> None:
    faulty.blobs["latest"] = b"x"
    faulty.faults += [("GET", "manifests/", status)] * QUICK.attempts
    with pytest.raises(RegistryError) as failed:
        repository.manifest("latest")
    assert failed.value.retryable
    assert str(failed.value).startswith(f"registry-unavailable: docker://{repository.registry}/team/x: ")
    assert "\n" not in str(failed.value)
    assert not faulty.faults


def test_a_proxy_that_takes_no_large_bodies_is_told_at_once(
    faulty: type[Faulty], server: Server, repository: RegistryRepository
) -> None:
    faulty.faults += [("PUT", "upload/", 413)]
    with pytest.raises(RegistryError, match=r"413.*proxy before the registry"):
        repository.put_blob([b"abc"], "text/plain")
    assert len(asked(server, "PUT")) == 1


def test_the_login_stays_with_the_registry_when_blobs_lie_elsewhere(
    faulty: type[Faulty], server: Server, repository: RegistryRepository
) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    challenge = (401, {"WWW-Authenticate": 'Basic realm="x"'})
    faulty.faults += [("GET", "manifests/", challenge)]
    elsewhere = type("Storage", (Faulty,), {"blobs": faulty.blobs, "faults": [("GET", "blobs/", "cut")]})
    with serve(elsewhere) as storage:
        faulty.storage = storage.host
        assert read_file(image, "data/weights") == WEIGHTS["data/weights"]
    assert asked(server, "GET", "blobs/")[-1]["headers"]["Authorization"].startswith("Basic ")
    assert storage.asked
    assert not [a for a in storage.asked if "Authorization" in a["headers"]]
    # After the cut the registry is asked anew: what it signs does not last.
    assert len(asked(server, "GET", "blobs/")) == len(storage.asked) == 2


def test_a_storage_that_refuses_is_not_taken_for_a_wrong_login(
    faulty: type[Faulty], repository: RegistryRepository
) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    elsewhere = type("Storage", (Faulty,), {"blobs": faulty.blobs, "faults": [("GET", "blobs/", 403)]})
    with serve(elsewhere) as storage:
        faulty.storage = storage.host
        with pytest.raises(RegistryError, match="storage answered 403"):
            read_file(image, "data/weights")


def test_a_redirect_that_never_ends_does(faulty: type[Faulty], server: Server, repository: RegistryRepository) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    faulty.storage = server.host
    with pytest.raises(RegistryError, match="redirects"):
        read_file(image, "data/weights")


def test_a_manifest_that_is_not_what_its_digest_says_is_damaged(
    faulty: type[Faulty], repository: RegistryRepository
) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    faulty.blobs[image.digest] = faulty.blobs[image.digest].replace(b"layers", b"lawyers")
    with pytest.raises(ImageError, match="image-damaged"):
        repository.manifest(image.digest)
    assert not repository.has(image.digest)


@pytest.mark.parametrize("raw", [b"", b"<html>", b"[]", b"{}", b'{"config":{},"layers":[]}', b'{"manifests":[1]}'])
def test_what_is_no_manifest_is_called_damaged(
    faulty: type[Faulty], repository: RegistryRepository, raw: bytes
) -> None:
    faulty.blobs["latest"] = raw
    with pytest.raises(ImageError, match="image-damaged"):
        find_image(repository, "latest")


def test_a_layer_that_is_cut_off_is_damaged_even_if_its_tar_is_whole(
    faulty: type[Faulty], repository: RegistryRepository
) -> None:
    image = build_image(repository, [WEIGHTS], annotations={})
    digest = repository.manifest(image.digest)["layers"][0]["digest"]
    faulty.blobs[digest] = faulty.blobs[digest][:-512]
    with pytest.raises(ImageError, match="image-damaged"):
        read_file(image, "data/weights")


def test_bytes_that_were_packed_on_the_way_are_asked_for_as_they_are(
    server: Server, repository: RegistryRepository
) -> None:
    blob = repository.put_blob([gzip.compress(b"abc", mtime=0)], "text/plain")
    with repository.open_blob(blob.digest) as stream:
        assert gzip.decompress(stream.read()) == b"abc"
    assert asked(server, "GET")[-1]["headers"]["Accept-Encoding"] == "identity"


def test_a_refusal_repeats_nothing_of_a_secret(faulty: type[Faulty], repository: RegistryRepository) -> None:
    faulty.faults += [("POST", "uploads", (401, {"WWW-Authenticate": 'Basic realm="x"'}))] * 2
    faulty.faults += [("POST", "uploads", 403)]
    with pytest.raises(AccessError, match="push-refused") as refused:
        repository.probe_push()
    assert "hunter2" not in str(refused.value) + repr(repository)


@pytest.mark.parametrize(
    ("registry", "plain"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.1.2.3", True),
        ("[::1]:5000", True),
        ("registry.example", False), ("10.0.0.1:5000", False), ("zot.registry:5000", True), ("zot.registry", False),
        ("any.example", True), ("any.example:8080", True), ("localhost.example", False),
    ],
)  # fmt: skip
def test_tls_is_left_out_only_for_this_machine_and_for_registries_that_are_named(
    registry: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAITO_FLOWS_INSECURE_REGISTRIES", "zot.registry:5000, any.example")
    assert is_plain(registry) is plain
    assert RegistryRepository(registry, "x")._session.base.scheme == ("http" if plain else "https")
