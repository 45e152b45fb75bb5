"""A proxy that counts what is asked of an HTTP API, for the API server's own metrics do not say who asks.

It listens on loopback without TLS and adds its own login, so that whoever is counted needs nothing but its address. A
watch or a log that is followed is one request, however long it lasts.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx

_NOT_PASSED_ON = {"host", "connection", "authorization", "content-length", "transfer-encoding", "keep-alive", "upgrade"}
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Asked(NamedTuple):
    """One request: when, with which verb, of which resource (of Kubernetes; of another API, its path)."""

    time: float
    verb: str
    resource: str


class CountingProxy:
    """Passes requests on to what `upstream` leads to, and keeps a list of them."""

    def __init__(self, upstream: httpx.Client) -> None:
        self.asked: list[Asked] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                """Take one request; a caller that is gone is no fault."""
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

            def _pass_on(self) -> None:
                asked.append(Asked(time.time(), *what(self.command, self.path)))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _NOT_PASSED_ON}
                timeout = httpx.Timeout(30.0, read=None)
                with upstream.stream(
                    self.command, self.path, headers=headers, content=body, timeout=timeout
                ) as response:
                    self.send_response(response.status_code)
                    for name, value in response.headers.items():
                        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                            self.send_header(name, value)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    with contextlib.suppress(httpx.TransportError):
                        for chunk in response.iter_raw():
                            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                        self.wfile.write(b"0\r\n\r\n")
                        return
                self.close_connection = True

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def kubeconfig(self, path: Path, namespace: str) -> Path:
        """Write a kubeconfig that leads through it."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "counted", "cluster": {"server": self.url}}],
            "users": [{"name": "counted", "user": {"token": "the proxy has another"}}],
            "contexts": [
                {"name": "counted", "context": {"cluster": "counted", "user": "counted", "namespace": namespace}}
            ],
            "current-context": "counted",
        }
        path.write_text(json.dumps(config))
        return path

    def since(self, moment: float) -> list[Asked]:
        """What was asked from then on."""
        return [one for one in list(self.asked) if one.time >= moment]


def table(asked: list[Asked]) -> list[tuple[str, int]]:
    """How often each verb was asked of each resource, the most frequent first."""
    return Counter(f"{one.verb} {one.resource}" for one in asked).most_common()


def what(method: str, path: str) -> tuple[str, str]:
    """The verb and the resource of a request to Kubernetes."""
    url = urlsplit(path)
    parts = url.path.strip("/").split("/")
    if parts[0] not in ("api", "apis") or "flow_runs" in parts or "deployments" in parts[:2]:
        return method, url.path
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    if not rest:
        return method.lower(), url.path
    resource = "/".join([rest[0], *rest[2:3]])
    if method == "GET":
        query = parse_qs(url.query)
        if query.get("watch") == ["true"] or query.get("watch") == ["1"]:
            return "watch", resource
        if query.get("follow") == ["true"]:
            return "follow", resource
        return ("get" if len(rest) > 1 else "list"), resource
    return _VERBS.get(method, method), resource
