"""Who to be at a registry: what Docker's and Kubernetes' configuration files say.

    {"auths": {KEY: {"auth": base64("user:password")} | {"username", "password"}
                    | {"identitytoken"} | {"registrytoken"}}}

A key is a host; it may have a scheme, a port and a path prefix, and `*` and `?` in each label of the host. Several keys
may fit: the most specific one goes first. The older form, `.dockercfg`, lacks the level `auths`.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaito_flows.errors import InputError

__all__ = ["SECRETS", "Credentials", "Login", "merged_dockerconfigs"]

SECRETS = Path("/var/run/secrets/kaito-flows/registry")
"""Where pods have their registry Secrets mounted, a folder each."""

_FILES = (".dockerconfigjson", "config.json", ".dockercfg")
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HUB_KEY = "https://index.docker.io/v1/"
_TOKEN_USERS = ("<token>", "00000000-0000-0000-0000-000000000000")


@dataclass(frozen=True, slots=True)
class Login:
    """One way to log in; `source` says where it was found. Its text form shows no secret."""

    source: str
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def refresh_token(self) -> str:
        """The token that is exchanged for others: an identity token, or the password of a user that stands for one."""
        return self.identity_token or (self.password if self.username in _TOKEN_USERS else "")


@dataclass(frozen=True, slots=True)
class _Config:
    """A configuration file: where it is, what it says or why it cannot be read, and whether its helpers may be run."""

    place: str
    raw: bytes = field(repr=False)
    helpers: bool = False
    unreadable: str = ""


class Credentials:
    """The logins of a registry, looked up anew each time: Secrets are renewed while a run lasts."""

    def __init__(self, read: Callable[[], list[_Config]], *, searched: str) -> None:
        self._read, self._searched = read, searched

    def __repr__(self) -> str:
        return f"Credentials({self._searched!r})"

    @classmethod
    def from_dockerconfig(cls, *raw: bytes, place: str = "imagePushSecret") -> Credentials:
        """Return the credentials in the bytes of `.dockerconfigjson` or `.dockercfg` files; helpers are not run.

        Raises:
            InputError: (`invalid-dockerconfig`) one of them is not JSON, or not of that form.
        """
        configs = [_Config(place, item) for item in raw]
        for config in configs:
            _entries(config)
        return cls(lambda: configs, searched=place)

    @classmethod
    def default(cls) -> Credentials:
        """Return the credentials of this user or pod: Docker's own configuration, and the Secrets under `SECRETS`."""
        own = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
        return cls(lambda: list(_read_default(own, SECRETS)), searched=f"{own / 'config.json'}, {SECRETS}")

    def logins(self, host: str, repository: str) -> list[Login]:
        """Return every login that fits, the most specific first; a file that cannot be used is passed over."""
        found: list[tuple[tuple[int, int], Login]] = []
        for config in self._read():
            try:
                entries = _entries(config)
            except InputError:
                continue
            if config.helpers and (login := _ask_helper(config, host)) is not None:
                found.append(((0, 0), login))
            for key, entry in entries.items():
                rank = _fits(key, host, repository)
                login = _login(entry, f"{config.place}: {key}") if rank else None
                if rank and login:
                    found.append((rank, login))
        return [login for _, login in sorted(found, key=lambda pair: pair[0])]

    def explain(self, host: str, repository: str) -> str:
        """Say in one line what was looked at for a registry, and what was found; without any secret."""
        configs = self._read()
        if not configs:
            return f"no credentials in {self._searched}"
        told = []
        for config in configs:
            try:
                entries = _entries(config)
            except InputError as exc:
                told.append(f"{config.place} is {exc.message}")
                continue
            fitting = [key for key in entries if _fits(key, host, repository)]
            unusable = [key for key in fitting if _login(entries[key], "") is None]
            if unusable:
                told.append(f"{config.place} has an entry {unusable[0]!r} without a usable auth")
            elif fitting:
                told.append(f"used {config.place}: {', '.join(fitting)}")
            else:
                told.append(f"{config.place} has entries for {', '.join(entries) or 'nothing'}")
        if not any(t.startswith("used ") for t in told):
            told.append(f"does the Secret hold an entry for {host}?")
        return "; ".join(told)


def merged_dockerconfigs(raw: Sequence[bytes]) -> bytes:
    """Return one `config.json` with the logins of several files; of two for the same key, the first.

    Raises:
        InputError: (`invalid-dockerconfig`) one of them is not JSON, or not of that form.
    """
    auths: dict[str, Mapping[str, Any]] = {}
    for item in raw:
        auths = {**_entries(_Config("imagePullSecrets", item)), **auths}
    return json.dumps({"auths": auths}).encode()


def _read_default(own: Path, secrets: Path) -> Iterator[_Config]:
    paths = [own / "config.json", *(folder / name for folder in sorted(secrets.glob("*")) for name in _FILES)]
    for path in paths:
        try:
            yield _Config(str(path), path.read_bytes(), helpers=path.parent == own)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            # Told when a login is missed; one that is not needed stops nobody.
            yield _Config(str(path), b"", unreadable=f"not readable: {exc.strerror}")


def _loaded(config: _Config) -> dict[str, Any]:
    if config.unreadable:
        raise InputError(config.unreadable, place=config.place, code="invalid-dockerconfig")
    try:
        loaded = json.loads(config.raw)
    except ValueError as exc:
        raise InputError("not JSON", place=config.place, code="invalid-dockerconfig") from exc
    if not isinstance(loaded, dict):
        raise InputError("no JSON object", place=config.place, code="invalid-dockerconfig")
    return loaded


def _entries(config: _Config) -> dict[str, Mapping[str, Any]]:
    loaded = _loaded(config)
    auths = loaded.get("auths", {}) if {"auths", "credsStore", "credHelpers"} & set(loaded) else loaded
    if not isinstance(auths, dict):
        raise InputError('of another form: "auths" is no JSON object', place=config.place, code="invalid-dockerconfig")
    return {key: entry for key, entry in auths.items() if isinstance(entry, dict)}


def _login(entry: Mapping[str, Any], source: str) -> Login | None:
    """Return what an entry says, or None if it says nothing that can be used."""
    texts: dict[str, str] = {key: value for key, value in entry.items() if isinstance(value, str) and value}
    username, password = texts.get("username", ""), texts.get("password", "")
    if "auth" in texts and not username:
        try:
            decoded = base64.b64decode(texts["auth"] + "=" * (-len(texts["auth"]) % 4), validate=True).decode()
        except ValueError:
            decoded = ""
        username, _, password = decoded.rstrip("\0").partition(":")
    identity, registry = texts.get("identitytoken", ""), texts.get("registrytoken", "")
    if not (identity or registry or (username and password)):
        return None
    return Login(source, username, password, identity, registry)


def _fits(key: str, host: str, repository: str) -> tuple[int, int] | None:
    """Return how specific a key is for this repository (less is more), or None if it is for another."""
    pattern, _, path = re.sub(r"^https?://", "", key).partition("/")
    path = re.sub(r"^v[12](/|$)", "", path).strip("/")
    if pattern in _DOCKER_HUB:
        pattern = _DOCKER_HUB[0]
    labels, wanted = pattern.lower().split("."), host.lower().split(".")
    if len(labels) != len(wanted) or not all(map(_label_fits, wanted, labels)):
        return None
    if path and not f"{repository}/".startswith(f"{path}/"):
        return None
    return -len(path.split("/")) if path else 0, pattern.count("*") + pattern.count("?")


def _label_fits(label: str, pattern: str) -> bool:
    # A port is part of the last label, and must be the same.
    name, _, port = label.partition(":")
    wanted, _, wanted_port = pattern.partition(":")
    return port == wanted_port and fnmatch.fnmatchcase(name, wanted)


def _ask_helper(config: _Config, host: str) -> Login | None:
    """Ask the program that Docker would ask (`credHelpers`, then `credsStore`), if one is set and knows the host."""
    loaded = _loaded(config)
    server = _HUB_KEY if host in _DOCKER_HUB else host
    helpers = loaded.get("credHelpers")
    name = (helpers.get(server) if isinstance(helpers, dict) else None) or loaded.get("credsStore")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        return None
    program = f"docker-credential-{name}"
    try:
        asked = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=30, check=True)
        answer = json.loads(asked.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None  # Docker, too, goes on without: the registry then says what is missing
    return Login(f"{config.place}: {program}", str(user), str(secret))
