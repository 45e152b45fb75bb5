"""HTTP with one registry for one repository: logins, retries, redirects, and one error for each way to say no."""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from kaito_flows import __version__
from kaito_flows.errors import AccessError, ImageError, KaitoFlowsError, RegistryError
from kaito_flows.oci.credentials import Credentials, Login
from kaito_flows.oci.tokens import Challenge, authorization

__all__ = ["TRANSIENT", "Access", "Retries", "Session", "is_plain"]

Access = Literal["pull", "push", "delete"]
_ACTIONS: dict[Access, tuple[str, ...]] = {
    "pull": ("pull",),
    "push": ("pull", "push"),
    "delete": ("pull", "push", "delete"),
}
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
REDIRECTS = 5
# A registry that moves a large blob into its storage answers late.
TIMEOUT = httpx.Timeout(connect=10, read=300, write=60, pool=10)


@dataclass(frozen=True, slots=True)
class Retries:
    """How often something is tried, and how long is waited in between: doubled each time, and a random part of it."""

    attempts: int = 6
    first_seconds: float = 0.5
    longest_seconds: float = 30.0

    def wait(self, failures: int, retry_after: str = "") -> None:
        """Sleep after so many failures, at least as long as the registry asks for, within reason."""
        longest = min(self.longest_seconds, self.first_seconds * 2 ** (failures - 1))
        time.sleep(max(random.uniform(longest / 2, longest), min(_seconds(retry_after), self.longest_seconds)))


def _seconds(retry_after: str) -> float:
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 0.0


def is_plain(registry: str) -> bool:
    """Whether a registry is spoken to without TLS: this machine's own, and those that the environment names."""
    insecure = os.environ.get("KAITO_FLOWS_INSECURE_REGISTRIES", "").split(",")
    host = _host_of(registry)
    return _is_loopback(host) or bool({registry, host} & {name.strip() for name in insecure})


def _host_of(registry: str) -> str:
    return httpx.URL(f"http://{registry}").host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Session:
    """Requests to one registry on behalf of one repository; every response that comes back is one to work with."""

    def __init__(self, registry: str, repository: str, credentials: Credentials | None, retries: Retries) -> None:
        self.registry, self.repository, self.retries = registry, repository, retries
        self._credentials = credentials or Credentials.default()
        host = "registry-1.docker.io" if registry == "docker.io" else registry
        self.base = httpx.URL(f"{'http' if is_plain(registry) else 'https'}://{host}/v2/{repository}/")
        self._client = httpx.Client(
            timeout=TIMEOUT,
            headers={"User-Agent": f"kaito-flows/{__version__}"},
            # A proxy is not for this machine's own registry.
            trust_env=not _is_loopback(_host_of(registry)),
        )
        self._granted: dict[Access, str] = {}
        self._challenge: Challenge | None = None

    @property
    def place(self) -> str:
        """The repository, for messages."""
        return f"docker://{self.registry}/{self.repository}"

    def request(
        self,
        method: str,
        url: str | httpx.URL,
        access: Access,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
        allow: tuple[int, ...] = (),
        place: str = "",
    ) -> httpx.Response:
        """Send a request until it is answered, and return the response, read to its end.

        Args:
            method: of HTTP.
            url: relative to the repository, or absolute: where the registry says that an upload goes on.
            access: what the login must be good for.
            headers: besides those for authorization.
            content: the body; an iterable is iterated again for each try.
            allow: statuses from 400 up that are no error here.
            place: what it is about, for messages.

        Raises:
            AccessError, ImageError, RegistryError: what `refusal` says of the response; no answer after all tries.
        """
        response = self._retried(lambda: self.once(method, url, access, headers=headers, content=content))
        if response.status_code >= 400 and response.status_code not in allow:
            raise self.refusal(response, access, place or self.place)
        return response

    def once(
        self,
        method: str,
        url: str | httpx.URL,
        access: Access,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx.Response:
        """Send a request one time, and return whatever is answered, read to its end.

        Raises:
            httpx.TransportError: nothing was.
        """
        response = self._logged_in(method, url, access, headers, content)
        with contextlib.closing(response):
            response.read()
        return response

    @contextlib.contextmanager
    def stream(
        self,
        method: str,
        url: str | httpx.URL,
        access: Access,
        *,
        headers: Mapping[str, str] | None = None,
        place: str = "",
    ) -> Iterator[httpx.Response]:
        """Do as `request` does, and hand the response out before its body is read."""

        def send() -> httpx.Response:
            response = self._logged_in(method, url, access, headers, None)
            if response.is_error:
                response.read()
            return response

        with contextlib.closing(self._retried(send)) as response:
            if response.is_error:
                raise self.refusal(response, access, place or self.place)
            yield response

    def refusal(self, response: httpx.Response, access: Access, place: str) -> KaitoFlowsError:
        """Return the error that a response stands for."""
        words, status = _words(response), response.status_code
        message = f"the registry answered {status}" + (f": {words}" if words else "")
        if not self._is_registry(response.request.url):
            return RegistryError(message.replace("registry", "registry's storage", 1), place=place)
        if status in (401, 403):
            verb = "pull" if access == "pull" else "push"
            hint = self._credentials.explain(self.registry, self.repository)
            hint += f"; is the login still good, and may it {verb} there?" if hint.startswith("used ") else ""
            return AccessError(message, place=place, hint=hint, code=f"{verb}-refused")
        if status == 404:
            hint = "" if access == "pull" else "does the repository have to be created first?"
            return ImageError(words or "not there", place=place, hint=hint, code="image-not-found")
        if status == 413:
            hint = "let the proxy before the registry take bodies of any size"
            return RegistryError(message, place=place, hint=hint)
        return RegistryError(message, place=place)

    def _retried(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """Call `send` until it gets an answer that is no passing failure.

        Raises:
            RegistryError: it did not, after all tries.
        """
        for failures in range(1, self.retries.attempts + 1):
            retry_after = ""
            try:
                response = send()
                if response.status_code not in TRANSIENT:
                    return response
                retry_after = response.headers.get("retry-after", "")
                error = self.refusal(response, "pull", self.place)
            except (httpx.TransportError, httpx.InvalidURL) as exc:
                error = self.unreachable(exc)
                error.__cause__ = exc
                if _distrusted(exc):
                    raise error from exc
            if failures < self.retries.attempts:
                self.retries.wait(failures, retry_after)
        raise error

    def unreachable(self, exc: Exception) -> RegistryError:
        """Return the error for a registry that did not answer."""
        if _distrusted(exc):
            hint = "name the certificate's authority in SSL_CERT_FILE"
            return RegistryError(f"its certificate is not trusted: {exc}", place=self.place, hint=hint)
        hint = f"is {self.registry} the right name, and does it listen?"
        if not is_plain(self.registry):
            hint += " A registry without TLS must be named in KAITO_FLOWS_INSECURE_REGISTRIES"
        return RegistryError(f"no answer: {exc or type(exc).__name__}", place=self.place, hint=hint)

    def _logged_in(
        self,
        method: str,
        url: str | httpx.URL,
        access: Access,
        headers: Mapping[str, str] | None,
        content: bytes | Iterable[bytes] | None,
    ) -> httpx.Response:
        """Send with what was granted before; when that is not enough, with each login in turn, then as nobody."""

        def send(granted: str) -> httpx.Response:
            request = self._client.build_request(method, self.base.join(url), headers=headers, content=content)
            return self._redirected(request, granted)

        # What is good for a push is good for a pull.
        response = send(self._granted.get(access) or (access == "pull" and self._granted.get("push")) or "")
        challenge = Challenge.of(response) or self._challenge
        if not self._is_denial(response) or challenge is None:
            return response
        self._challenge = challenge
        self._granted.pop(access, None)
        self._check_realm(challenge)
        scope = challenge.scope_for(self.repository, _ACTIONS[access])
        logins: list[Login | None] = [*self._credentials.logins(self.registry, self.repository), None]
        for login in logins:
            granted = authorization(self._client, self._answered, challenge, login, scope)
            if granted is None:
                continue
            response.close()
            response = send(granted)
            if not self._is_denial(response):
                self._granted[access] = granted
                break
        return response

    def _answered(self, request: httpx.Request) -> httpx.Response:
        return self._retried(lambda: self._client.send(request))

    def _check_realm(self, challenge: Challenge) -> None:
        if challenge.scheme == "bearer":
            realm = self.base.join(challenge.realm)
            plain = self.base.scheme == "http" or _is_loopback(realm.host)
            if realm.scheme != "https" and not plain:
                raise RegistryError("the token server has no TLS; no password is sent there", place=str(realm))

    def _is_denial(self, response: httpx.Response) -> bool:
        return response.status_code in (401, 403) and self._is_registry(response.request.url)

    def _is_registry(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self.base.scheme, self.base.host, self.base.port)

    def _redirected(self, request: httpx.Request, granted: str) -> httpx.Response:
        """Send, and go where the registry says that the bytes are; only the registry itself gets the authorization."""
        for _ in range(REDIRECTS + 1):
            if granted and self._is_registry(request.url):
                request.headers["Authorization"] = granted
            response = self._client.send(request, stream=True)
            if not (response.has_redirect_location and request.method in ("GET", "HEAD")):
                return response
            response.close()
            target = request.url.join(response.headers["location"])
            kept = {k: v for k, v in request.headers.items() if k.lower() not in ("authorization", "host", "cookie")}
            request = self._client.build_request(request.method, target, headers=kept)
        raise RegistryError(f"more than {REDIRECTS} redirects", place=self.place)


def _distrusted(exc: BaseException | None) -> bool:
    while exc is not None and not isinstance(exc, ssl.SSLCertVerificationError):
        exc = exc.__cause__ or exc.__context__
    return exc is not None


def _words(response: httpx.Response) -> str:
    """What the registry says went wrong, in its own words; they end up in a log, so not many."""
    try:
        errors: Any = json.loads(response.content)["errors"]
        told = [f"{e.get('code', '')} {e.get('message', '')}".strip() for e in errors]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return "; ".join(told)[:200]
