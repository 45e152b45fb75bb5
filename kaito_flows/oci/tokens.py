"""From a registry's challenge to an `Authorization` header: distribution's token specification, and ACR's ways.

401, WWW-Authenticate: Basic realm=…                    user and password go to the registry itself
401, WWW-Authenticate: Bearer realm=…,service=…,scope=…
     user and password    GET realm with Basic          -> token
     a refresh token      POST realm, a form            -> access_token; where there is no POST, GET with Basic
     nobody               GET realm                     -> token, for what everybody may pull
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import httpx

from kaito_flows.errors import RegistryError
from kaito_flows.oci.credentials import Login

__all__ = ["Challenge", "authorization"]

Send = Callable[[httpx.Request], httpx.Response]
CLIENT = "kaito-flows"
_PARAMETER = re.compile(r'(\w+)=(?:"([^"]*)"|([^\s,]+))')
# The user that stands for a refresh token where only user and password are taken.
_NOBODY = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a registry asks for: the scheme (`basic` or `bearer`), where tokens are had, for which service and scope."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""

    @classmethod
    def of(cls, response: httpx.Response) -> Challenge | None:
        """Read the challenge of a response, if it has one that is known; tokens before passwords."""
        found = []
        for value in response.headers.get_list("www-authenticate"):
            # One header may hold several challenges.
            for part in re.split(r",\s*(?=(?:basic|bearer)\s)", value, flags=re.IGNORECASE):
                scheme, _, rest = part.strip().partition(" ")
                keys = {key.lower(): quoted or bare for key, quoted, bare in _PARAMETER.findall(rest)}
                if scheme.lower() in ("basic", "bearer"):
                    known = {key: keys.get(key, "") for key in ("realm", "service", "scope")}
                    found.append(cls(scheme.lower(), **known))
        return next((c for c in found if c.scheme == "bearer" and c.realm), next((c for c in found), None))

    def scope_for(self, repository: str, actions: Iterable[str]) -> str:
        """The scope to ask for: these actions, and those that the registry says it needs for the same repository.

        A token for what was asked first (a HEAD needs only `pull`) would not do for what comes next.
        """
        prefix = f"repository:{repository}:"
        told = [scope.removeprefix(prefix).split(",") for scope in self.scope.split() if scope.startswith(prefix)]
        return prefix + ",".join(dict.fromkeys([*actions, *(action for more in told for action in more)]))


def authorization(
    client: httpx.Client, send: Send, challenge: Challenge, login: Login | None, scope: str
) -> str | None:
    """Return the `Authorization` header for a login (None: nobody), or None if it is refused or of no use here.

    Raises:
        RegistryError: the token server answers with nonsense.
    """
    if challenge.scheme == "basic":
        return _basic(login) if login else None
    if login and login.registry_token:
        return f"Bearer {login.registry_token}"
    asked = {"service": challenge.service, "scope": scope}
    asked = {key: value for key, value in asked.items() if value}
    if login and login.refresh_token:
        form = {"grant_type": "refresh_token", "client_id": CLIENT, "refresh_token": login.refresh_token, **asked}
        response = send(client.build_request("POST", challenge.realm, data=form))
        if response.is_success:
            return _token(response, challenge.realm)
    headers = {"Authorization": basic} if login and (basic := _basic(login)) else {}
    response = send(client.build_request("GET", challenge.realm, params=asked, headers=headers))
    if response.is_success:
        return _token(response, challenge.realm)
    if response.status_code in (400, 401, 403, 404, 405):
        return None
    raise RegistryError(f"the token server answered {response.status_code}", place=challenge.realm)


def _basic(login: Login) -> str | None:
    user, password = (_NOBODY, login.refresh_token) if login.refresh_token else (login.username, login.password)
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}" if password else None


def _token(response: httpx.Response, realm: str) -> str:
    try:
        body = response.json()
        token = body.get("access_token") or body.get("token")
    except (ValueError, AttributeError) as exc:
        raise RegistryError("the token server answered with something else than JSON", place=realm) from exc
    if not isinstance(token, str):
        raise RegistryError("the token server's answer holds no token", place=realm)
    return f"Bearer {token}"
