"""How Azure's stand-in is reached: as a proxy that looks into TLS, and answers for two hosts instead of asking them."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from arm import Azure

TENANT, CLIENT = "66666666-7777-8888-9999-000000000000", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
ARM_HOST, LOGIN_HOST = "management.azure.com", "login.microsoftonline.com"

Body = dict[str, Any]


@dataclass
class Fault:
    """What goes wrong with the next requests of a method whose path has `path` in it.

    A status with an error body, `raw` instead of one, or a connection that is cut, `before` or `after` it was acted on.
    """

    method: str
    status: int = 0
    code: str = ""
    message: str = ""
    path: str = ""
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes = b""
    cut: str = ""


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str, *, flat: bool = True, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        error = {"code": code, "message": message}
        self.body: Body = {**error, "details": None, "subcode": ""} if flat else {"error": error}


class Handler(BaseHTTPRequestHandler):
    """A proxy that answers itself for Azure's two hosts, and for no other."""

    azure: Azure
    tls: ssl.SSLContext
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host = ""

    def log_message(self, *args: Any) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(":")[0]
        if self.host not in (ARM_HOST, LOGIN_HOST):
            self.send_error(403, "nothing leaves this machine")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        except OSError:
            self.close_connection = True
            return
        self.rfile, self.wfile = self.connection.makefile("rb", -1), self.connection.makefile("wb", 0)  # type: ignore[assignment]
        self.close_connection = False

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.host == LOGIN_HOST:
            self._sign_in(body)
        elif self.host == ARM_HOST:
            self._arm(body)
        else:
            self.send_error(400, "only as a proxy")

    do_PUT = do_DELETE = do_POST = do_GET

    def _arm(self, body: bytes) -> None:
        azure, url = self.azure, urllib.parse.urlsplit(self.path)
        with azure.lock:
            azure.calls.append((self.command, url.path))
            fault = self._fault(url.path)
            if fault is not None and fault.cut != "after":
                self._go_wrong(fault, {})
                return
            try:
                query = dict(urllib.parse.parse_qsl(url.query))
                status, answer, headers = azure.answer(self.command, url.path, query, self.headers, body)
            except Refused as exc:
                status, answer, headers = exc.status, exc.body, exc.headers
        if fault is not None:
            self._go_wrong(fault, headers)
            return
        self._send(status, b"" if answer is None else json.dumps(answer).encode(), headers)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.azure.faults:
            if fault.times and fault.method == self.command and fault.path in path:
                fault.times -= 1
                return fault
        return None

    def _go_wrong(self, fault: Fault, headers: Mapping[str, str]) -> None:
        if fault.cut:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        error = {"error": {"code": fault.code, "message": fault.message}}
        self._send(fault.status, fault.raw or json.dumps(error).encode(), fault.headers)

    def _sign_in(self, body: bytes) -> None:
        base = f"https://{LOGIN_HOST}/{TENANT}"
        answer: Body
        if self.path.endswith("/.well-known/openid-configuration"):
            answer = {
                "issuer": f"{base}/v2.0",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
            }
            self._send(200, json.dumps(answer).encode(), {})
            return
        form = dict(urllib.parse.parse_qsl(body.decode()))
        assertion = (self.azure.folder / "federated-token").read_text()
        known = form.get("client_id") == CLIENT and form.get("client_assertion") == assertion
        if self.command == "POST" and self.path.partition("?")[0] == f"/{TENANT}/oauth2/v2.0/token" and known:
            answer = {"token_type": "Bearer", "expires_in": 86399, "access_token": self.azure.token}
            self._send(200, json.dumps(answer).encode(), {})
            return
        answer = {
            "error": "invalid_client",
            "error_description": "AADSTS700213: No matching federated identity record.",
        }
        self._send(401, json.dumps(answer).encode(), {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        with suppress(OSError):
            self.send_response_only(status)
            self.send_header("Date", format_datetime(datetime.fromtimestamp(self.azure.wall(), UTC), usegmt=True))
            self.send_header("Content-Type", "application/json")
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)


def certificates(folder: Path) -> ssl.SSLContext:
    """An authority of the test's own (`ca.pem`), and a certificate of it for Azure's two hosts."""
    now = datetime.now(UTC)

    def certificate(name: str, key: Any, issuer: str, signer: Any, *extensions: tuple[Any, bool]) -> x509.Certificate:
        subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer))
        builder = x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=2))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    constraint = x509.BasicConstraints(ca=True, path_length=0)
    ca = certificate("tests", ca_key, "tests", ca_key, (constraint, True), (usage, True), (identifier, False))
    names = x509.SubjectAlternativeName([x509.DNSName(ARM_HOST), x509.DNSName(LOGIN_HOST)])
    own = certificate("azure", key, "tests", ca_key, (names, False), (authority, False))
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(secret + own.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context
