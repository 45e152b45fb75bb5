"""A token server as ACR's, and a registry with faults, each a small HTTP server of the test's own."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

REFRESH_TOKEN = "a-refresh-token"
GUID = "00000000-0000-0000-0000-000000000000"


@dataclass
class Server:
    """A server that runs: its host and port, and what it was asked."""

    host: str
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    """Run a handler on a free port while the block lasts; it finds its `Server` as `self.server.facts`."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    facts = Server(f"127.0.0.1:{http.server_address[1]}")
    http.facts = facts  # type: ignore[attr-defined] # the handler's way to the test
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield facts
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class Signer:
    """Signs tokens as the registry takes them: RS256, with the certificate in the header."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def token(self, access: list[dict[str, Any]], seconds: float) -> str:
        der = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        now = int(time.time())
        claims = {"iss": "tokens", "sub": "", "aud": "registry", "jti": str(time.monotonic_ns()), "access": access}
        times = {"iat": now, "nbf": now - 60, "exp": int(now + seconds)}
        parts = [{"typ": "JWT", "alg": "RS256", "x5c": [der]}, claims | times]
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_base64url(self.key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass
class TokenRegistry:
    """A registry that takes tokens, and the server they come from; `seconds` is how long they last."""

    host: str
    tokens: Server
    seconds: float = 600
    takes_posts: bool = True

    @property
    def scopes(self) -> list[str]:
        return [asked["scope"] for asked in self.tokens.asked]


@pytest.fixture
def token_registry(tmp_path: Path, registry_with: Callable[..., Any]) -> Iterator[TokenRegistry]:
    """A real registry whose tokens come from a server that behaves as ACR's.

    `jane` may do everything, `reader` may pull, nobody may pull from `public/…`; refresh tokens stand for `jane`.
    """
    signer, made = Signer(), TokenRegistry("", Server(""))
    (tmp_path / "root.pem").write_bytes(signer.pem)

    class Tokens(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            scheme, _, login = self.headers.get("Authorization", "").partition(" ")
            user, _, password = base64.b64decode(login).decode().partition(":") if scheme == "Basic" else ("", "", "")
            logins = {("jane", "with:colon"): "jane", (GUID, REFRESH_TOKEN): "jane", ("reader", "r"): "reader"}
            if user and (user, password) not in logins:
                self.answer(401, {"errors": [{"code": "UNAUTHORIZED"}]})
            else:
                self.grant("GET", logins.get((user, password), ""), asked)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked = {key: values[0] for key, values in parse_qs(raw).items()}
            if not made.takes_posts:
                self.answer(405, {})
            elif asked.get("grant_type") != "refresh_token" or asked.get("refresh_token") != REFRESH_TOKEN:
                self.answer(400, {"errors": [{"code": "UNSUPPORTED"}]})
            else:
                self.grant("POST", "jane", asked)

        def grant(self, method: str, user: str, asked: dict[str, str]) -> None:
            made.tokens.asked.append({"method": method, "user": user, **asked})
            kind, name, actions = asked["scope"].split(":")
            allowed = {"jane": ["pull", "push", "delete"], "reader": ["pull"]}
            may = allowed.get(user, ["pull"] if name.startswith("public/") else [])
            access = [{"type": kind, "name": name, "actions": [a for a in actions.split(",") if a in may]}]
            key = "access_token" if method == "POST" else "token"
            self.answer(200, {key: signer.token(access, made.seconds)})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None: ...

    with serve(Tokens) as made.tokens:
        auth = {
            "token": {
                "realm": f"http://{made.tokens.host}/token",
                "service": "registry",
                "issuer": "tokens",
                "rootcertbundle": str(tmp_path / "root.pem"),
            }
        }
        with registry_with(auth) as made.host:
            yield made
