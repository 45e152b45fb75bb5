"""The way to an API server: where it is, who we are there, and patience while it is away.

The official client reads the configuration (service accounts, kubeconfig files, login plug-ins such as AKS's
kubelogin) and renews tokens; httpx carries the requests, because a watch or a log is a stream whose reads need time
limits and whose silence has to be noticed.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from kaito_flows.cluster.refusals import Request, is_route_missing, refusal
from kaito_flows.errors import AccessError, ClusterError, InputError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 600.0
MAX_BACKOFF_SECONDS = 30.0
_READ_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_RETRIED = frozenset({429, 500, 502, 503, 504})
# An API server that has just come up says no, or "not found", before it has read its own rules.
_DOUBTED = frozenset({401, 403, 404})
_DOUBT_SECONDS = 15.0
_MAX_INTERNAL_ERRORS = 5
# A peer that vanished without a word is noticed after 15 + 4 * 5 seconds, also on a stream that says nothing.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
        if hasattr(socket, name)
    ),
]


class Backoff:
    """Waits between tries, longer each time, until patience ends."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._since: float | None = None
        self._tries = 0
        self._away_until = -math.inf

    @property
    def in_doubt(self) -> bool:
        """Whether the API server was away a moment ago: what it refuses now, it may allow once it has its rules."""
        return time.monotonic() < self._away_until + _DOUBT_SECONDS

    def reset(self) -> None:
        """Start over: a try succeeded."""
        self._since, self._tries = None, 0

    def wait(self, exc: Exception | None, why: str, *, at_least: float = 0.0, at_most: float = math.inf) -> None:
        """Sleep before the next try.

        Raises:
            ClusterError: patience has ended; `exc` is its cause.
        """
        now = time.monotonic()
        doubt = isinstance(exc, InputError)
        self._since = now if self._since is None else self._since
        away = now - self._since
        pause = max(at_least, min(MAX_BACKOFF_SECONDS, 0.5 * 2**self._tries) * random.uniform(0.5, 1.0))
        if away + pause > self._patience:
            hint = "look whether the API server is up and reachable from here"
            raise ClusterError(f"the API server does not answer since {away:.0f} s: {why}", hint=hint) from exc
        logger.info("The API server does not answer (%s); next try in %.1f s", why, pause)
        self._tries += 1
        time.sleep(max(0.0, min(pause, at_most)))
        if not doubt:
            self._away_until = time.monotonic()


class _Login(httpx.Auth):
    """Adds the token, renewed by the official client when its time has come, and the name on the certificate."""

    def __init__(self, configuration: Any) -> None:
        self._configuration = configuration
        self._lock = threading.Lock()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        with self._lock:
            token = self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            request.headers["Authorization"] = token
        if name := getattr(self._configuration, "tls_server_name", None):
            request.extensions = {**request.extensions, "sni_hostname": name}
        yield request


@dataclass(frozen=True)
class Connection:
    """An API server, and one who may talk to it. Threads can share it."""

    server: str
    http: httpx.Client = field(repr=False)
    in_cluster: bool
    configuration: Any = field(repr=False)
    patience_seconds: float = PATIENCE_SECONDS

    def request(
        self,
        request: Request,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        patience_seconds: float | None = None,
    ) -> dict[str, Any]:
        """Ask, again while the API server is away or busy, and return its answer.

        Raises:
            KaitoFlowsError: the API server refused (`refusal` says with what), or did not answer for too long.
        """
        response = self._send(request, method, path, params, body, {"Content-Type": content_type}, patience_seconds)
        answer: dict[str, Any] = response.json()
        return answer

    def text(
        self, request: Request, path: str, *, params: Mapping[str, str], patience_seconds: float | None = None
    ) -> str:
        """Ask for a plain text, as `request` does."""
        response = self._send(request, "GET", path, params, None, {"Accept": "*/*"}, patience_seconds)
        return response.content.decode("utf-8", errors="replace")

    def headers(self, request: Request, path: str) -> Mapping[str, str]:
        """Ask, as `request` does, and return the headers of the answer."""
        return self._send(request, "GET", path, None, None, {"Accept": "application/json"}, None).headers

    def _send(
        self,
        request: Request,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Any,
        headers: Mapping[str, str],
        patience_seconds: float | None,
    ) -> httpx.Response:
        backoff = Backoff(self.patience_seconds if patience_seconds is None else patience_seconds)
        errors = 0
        while True:
            try:
                response = self.http.request(method, path, params=params, json=body, headers=headers)
            except httpx.TransportError as exc:
                _fail_on_distrust(exc, self.server)
                backoff.wait(exc, str(exc) or type(exc).__name__)
                continue
            status = response.status_code
            if status < 300:
                return response
            doubted = status in _DOUBTED and (status != 404 or is_route_missing(status, response.text))
            refused = refusal(request, status, response.text)
            # Most of what an API server calls an internal error is a hiccup of etcd, some of it stays.
            errors += status == 500
            busy = status in _RETRIED and errors < _MAX_INTERNAL_ERRORS
            if busy or (doubted and backoff.in_doubt):
                backoff.wait(refused, refused.message, at_least=_retry_after(response))
                continue
            raise refused

    @contextmanager
    def stream(
        self, request: Request, path: str, *, params: Mapping[str, str], read_seconds: float
    ) -> Iterator[httpx.Response]:
        """Open a watch or a log, once; no byte for `read_seconds` ends it with `httpx.ReadTimeout`.

        Raises:
            httpx.TransportError: the connection failed; the caller tries again.
            Busy: so does the API server want it.
            KaitoFlowsError: the API server refused.
        """
        timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS, read=read_seconds, pool=None)
        with self.http.stream("GET", path, params=params, timeout=timeout) as response:
            if response.status_code >= 300:
                text = response.read().decode("utf-8", errors="replace")
                if response.status_code in _RETRIED:
                    raise Busy(f"HTTP {response.status_code}: {text.strip()[:200]}")
                raise refusal(request, response.status_code, text)
            yield response

    def client(self, url: str, read_seconds: float) -> httpx.Client:
        """Return a client for `url`; with the caller's login if it lies behind the API server."""
        if url.startswith(self.server):
            return _client(self.configuration, url, self.in_cluster, read_seconds)
        return httpx.Client(
            base_url=url, timeout=httpx.Timeout(read_seconds, connect=_CONNECT_SECONDS), trust_env=False
        )


class Busy(Exception):
    """The API server answered, and wants to be asked later."""


def connect(context: str | None = None, *, patience_seconds: float = PATIENCE_SECONDS) -> tuple[Connection, str]:
    """Return the way to the cluster, and the namespace that goes with it.

    A context or `$KUBECONFIG` that is named goes first, then the service account of the pod this runs in, then
    `~/.kube/config`.

    Raises:
        InputError: there is no cluster to be found, or its configuration cannot be read.
        AccessError: the login plug-in that the kubeconfig names gave nothing.
    """
    from kubernetes import config as official
    from kubernetes.client import Configuration

    config: Any = official  # not all of it has types
    configuration = Configuration()
    named = os.environ.get("KUBECONFIG", "")
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (_SERVICE_ACCOUNT / "token").is_file()
    in_cluster = in_pod and not named and context is None
    try:
        if in_cluster:
            config.load_incluster_config(client_configuration=configuration)
            namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
        else:
            path = named or str(Path.home() / ".kube" / "config")
            if not any(Path(part).expanduser().is_file() for part in path.split(os.pathsep) if part):
                hint = "set KUBECONFIG, or run it in a pod; `kubectl config view` shows what kubectl would use"
                raise InputError(
                    f"no Kubernetes cluster is configured: there is no file {path}", code="no-cluster", hint=hint
                )
            namespace = _load(config, configuration, path, context)
        http = _client(configuration, configuration.host, in_cluster, _READ_SECONDS)
    except (config.ConfigException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, KeyError) as exc:
        hint = "`kubectl config view` shows what kubectl would use"
        raise InputError(f"the kubeconfig cannot be used: {exc}", code="no-cluster", hint=hint) from exc
    return Connection(configuration.host, http, in_cluster, configuration, patience_seconds), namespace


def _load(config: Any, configuration: Any, path: str, context: str | None) -> str:
    """Read a kubeconfig into `configuration`, and return its namespace."""
    config.load_kube_config(config_file=path, context=context, client_configuration=configuration, persist_config=False)
    contexts, active = config.list_kube_config_contexts(config_file=path)
    chosen = next((item for item in contexts if item["name"] == context), active)["context"]
    # The official client only logs that a login plug-in failed, and goes on as nobody.
    if not configuration.api_key and not configuration.cert_file and _has_plugin(path, chosen.get("user")):
        raise AccessError(
            "the login plug-in of the kubeconfig gave no credentials",
            place=path,
            hint="`kubectl version` shows what it says; for AKS: `kubelogin convert-kubeconfig`, then `az login`",
            code="not-logged-in",
        )
    return str(chosen.get("namespace") or "default")


def _has_plugin(path: str, user: str | None) -> bool:
    for part in path.split(os.pathsep):
        if part and Path(part).expanduser().is_file():
            content = yaml.safe_load(Path(part).expanduser().read_text()) or {}
            for item in content.get("users") or []:
                if item.get("name") == user:
                    return "exec" in (item.get("user") or {})
    return False


def _client(configuration: Any, base_url: str, in_cluster: bool, read_seconds: float) -> httpx.Client:
    return httpx.Client(
        base_url=base_url,
        auth=_Login(configuration),
        transport=_transport(configuration, in_cluster),
        timeout=httpx.Timeout(read_seconds, connect=_CONNECT_SECONDS, pool=None),
        headers={"User-Agent": "kaito-flows"},
    )


def _transport(configuration: Any, in_cluster: bool) -> httpx.HTTPTransport:
    """Return the transport with the cluster's certificates, and the proxy if one leads there."""
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if not configuration.verify_ssl:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    proxy = None if in_cluster else configuration.proxy
    host = httpx.URL(configuration.host).host
    if proxy in urllib.request.getproxies().values() and urllib.request.proxy_bypass(host):
        proxy = None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=10, keepalive_expiry=30.0)
    return httpx.HTTPTransport(verify=context, proxy=proxy, limits=limits, socket_options=_KEEPALIVE)


def _fail_on_distrust(exc: httpx.TransportError, server: str) -> None:
    """Raise for a certificate that is not trusted: waiting does not change it."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "the kubeconfig's certificate-authority-data does not belong to this server"
            message = f"the API server's certificate is not trusted: {cause.verify_message}"
            raise AccessError(message, place=server, hint=hint, code="cluster-not-trusted") from exc
        cause = cause.__cause__ or cause.__context__


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), MAX_BACKOFF_SECONDS) if text.isdigit() else 0.0
