"""Docker's configuration, Secrets and credential helpers: the login that fits best is found, and no secret is shown."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.errors import InputError
from kaito_flows.oci.credentials import Credentials, merged_dockerconfigs


def config(**auths: Any) -> bytes:
    return json.dumps({"auths": auths}).encode()


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def users(credentials: Credentials, host: str, repository: str = "team/x") -> list[str]:
    return [login.username for login in credentials.logins(host, repository)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (auth("jane:pass:with:colons"), ("jane", "pass:with:colons", "", "")),
        ({"auth": base64.b64encode(b"jane:p").decode().rstrip("=")}, ("jane", "p", "", "")),
        ({"username": "jane", "password": "p"}, ("jane", "p", "", "")),
        ({"username": "jane", "password": "p", **auth("other:q")}, ("jane", "p", "", "")),
        ({"identitytoken": "i", **auth("jane:")}, ("jane", "", "i", "")),
        ({"registrytoken": "r"}, ("", "", "", "r")),
    ],
)
def test_every_form_of_an_entry_is_read(entry: dict[str, str], expected: tuple[str, ...]) -> None:
    [login] = Credentials.from_dockerconfig(config(**{"a.example": entry})).logins("a.example", "x")
    assert (login.username, login.password, login.identity_token, login.registry_token) == expected


@pytest.mark.parametrize("entry", [{}, {"auth": "%%%"}, auth("nocolon"), auth(":p"), {"username": "jane"}, {"auth": 1}])
def test_an_entry_that_says_nothing_is_no_login_and_is_told(entry: dict[str, Any]) -> None:
    credentials = Credentials.from_dockerconfig(config(**{"a.example": entry}), place="secret/push")
    assert credentials.logins("a.example", "x") == []
    assert "secret/push has an entry 'a.example' without a usable auth" in credentials.explain("a.example", "x")


@pytest.mark.parametrize(
    ("key", "host", "repository", "fits"),
    [
        ("a.example", "a.example", "x", True),
        ("https://a.example", "a.example", "x", True),
        ("http://a.example/v2/", "a.example", "x", True),
        ("A.example", "a.example", "x", True),
        ("a.example", "b.a.example", "x", False),
        ("a.example", "a.example:5000", "x", False),
        ("a.example:5000", "a.example:5000", "x", True),
        ("a.example/team", "a.example", "team/x", True),
        ("a.example/team/x", "a.example", "team/x", True),
        ("a.example/team", "a.example", "teams/x", False),
        ("https://a.example/v1/team", "a.example", "team/x", True),
        ("*.azurecr.io", "mine.azurecr.io", "x", True),
        ("*.azurecr.io", "a.mine.azurecr.io", "x", False),
        ("m*e.azurecr.io", "mine.azurecr.io", "x", True),
        ("*.*.io", "mine.azurecr.io", "x", True),
        ("https://index.docker.io/v1/", "docker.io", "team/x", True),
        ("docker.io", "docker.io", "team/x", True),
        ("index.docker.io/team", "docker.io", "team/x", True),
        ("https://index.docker.io/v1/", "a.example", "x", False),
        ("", "a.example", "x", False),
    ],
)
def test_keys_fit_as_the_kubelet_reads_them(key: str, host: str, repository: str, fits: bool) -> None:
    credentials = Credentials.from_dockerconfig(config(**{key: auth("jane:p")}))
    assert users(credentials, host, repository) == ["jane"] * fits


def test_the_most_specific_key_goes_first_and_the_others_follow() -> None:
    keys = ["*.example", "a.example", "a.example/team", "a.example/team/x", "?.example"]
    credentials = Credentials.from_dockerconfig(config(**{key: auth(f"{key}:p") for key in keys}))
    found = users(credentials, "a.example")
    assert found == ["a.example/team/x", "a.example/team", "a.example", "*.example", "?.example"]


def test_the_old_form_has_no_auths() -> None:
    credentials = Credentials.from_dockerconfig(json.dumps({"a.example": auth("jane:p")}).encode())
    assert users(credentials, "a.example") == ["jane"]


def test_several_files_become_one_of_which_the_first_has_the_say() -> None:
    old = json.dumps({"b.example": auth("john:p")}).encode()
    merged = merged_dockerconfigs([config(**{"a.example": auth("jane:p")}), old, config(**{"a.example": auth("x:p")})])
    credentials = Credentials.from_dockerconfig(merged)
    assert users(credentials, "a.example") == ["jane"]
    assert users(credentials, "b.example") == ["john"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b'{"auths": []}', b"\xff\xfe"])
def test_a_secret_that_is_no_configuration_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError, match="invalid-dockerconfig: secret/push") as refused:
        Credentials.from_dockerconfig(raw, place="secret/push")
    assert "\n" not in str(refused.value)


def test_no_text_form_shows_a_secret() -> None:
    entry = {"username": "jane", "password": "hunter2", "identitytoken": "hunter3", "registrytoken": "hunter4"}
    credentials = Credentials.from_dockerconfig(config(**{"a.example": entry}))
    [login] = credentials.logins("a.example", "x")
    shown = f"{login} {login!r} {credentials} {credentials!r} {credentials.explain('a.example', 'x')}"
    assert "hunter" not in shown
    assert "jane" not in shown


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A user's own folder, and where a pod has its Secrets."""
    own, secrets = tmp_path / "own", tmp_path / "secrets"
    own.mkdir()
    secrets.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(own))
    monkeypatch.setattr("kaito_flows.oci.credentials.SECRETS", secrets)
    return own, secrets


def test_files_are_read_anew_each_time_from_everywhere(folders: tuple[Path, Path]) -> None:
    own, secrets = folders
    credentials = Credentials.default()
    assert users(credentials, "a.example") == []
    assert f"no credentials in {own / 'config.json'}, {secrets}" in credentials.explain("a.example", "x")
    (own / "config.json").write_bytes(config(**{"a.example": auth("own:p")}))
    for name, file in (("one", ".dockerconfigjson"), ("two", ".dockercfg"), ("three", "config.json")):
        (secrets / name).mkdir()
        raw = {"a.example": auth(f"{name}:p")}
        (secrets / name / file).write_text(json.dumps(raw if file == ".dockercfg" else {"auths": raw}))
    assert users(credentials, "a.example") == ["own", "one", "three", "two"]
    (own / "config.json").write_bytes(config(**{"a.example": auth("renewed:p")}))
    assert users(credentials, "a.example")[0] == "renewed"


def test_the_home_folder_is_looked_into_without_docker_config(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_bytes(config(**{"a.example": auth("jane:p")}))
    assert users(Credentials.default(), "a.example") == ["jane"]


def test_a_broken_file_is_passed_over_and_told(folders: tuple[Path, Path]) -> None:
    own, secrets = folders
    (own / "config.json").write_text("{broken")
    (secrets / "push").mkdir()
    (secrets / "push/.dockerconfigjson").write_bytes(config(**{"b.example": auth("jane:p")}))
    credentials = Credentials.default()
    assert users(credentials, "b.example") == ["jane"]
    told = credentials.explain("a.example", "x")
    assert f"{own / 'config.json'} is not JSON" in told
    assert "has entries for b.example; does the Secret hold an entry for a.example?" in told


def test_a_file_that_cannot_be_read_is_told(folders: tuple[Path, Path]) -> None:
    (folders[0] / "config.json").mkdir()
    credentials = Credentials.default()
    assert credentials.logins("a.example", "x") == []
    assert "config.json is not readable: Is a directory" in credentials.explain("a.example", "x")


def helper(folder: Path, name: str, answers: dict[str, tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / f"docker-credential-{name}"
    known = {
        server: json.dumps({"ServerURL": server, "Username": u, "Secret": s}) for server, (u, s) in answers.items()
    }
    cases = "\n".join(f"{server}) echo '{answer}';;" for server, answer in known.items())
    program.write_text(
        f'#!/bin/sh\n[ "$1" = get ] || exit 2\nread -r server\ncase $server in\n{cases}\n'
        "*) echo credentials not found in native keychain; exit 1;;\nesac\n"
    )
    program.chmod(0o755)


def test_a_laptops_credential_helpers_are_asked_as_docker_does(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path / "bin", "store", {"a.example": ("jane", "p"), "https://index.docker.io/v1/": ("hub", "p")})
    helper(tmp_path / "bin", "acr", {"mine.azurecr.io": ("<token>", "t")})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    own = {"auths": {"a.example": {}}, "credsStore": "store", "credHelpers": {"mine.azurecr.io": "acr"}}
    (folders[0] / "config.json").write_text(json.dumps(own))
    credentials = Credentials.default()
    assert [(login.username, login.password) for login in credentials.logins("a.example", "x")] == [("jane", "p")]
    assert users(credentials, "docker.io") == ["hub"]
    [login] = credentials.logins("mine.azurecr.io", "x")
    assert login.refresh_token == "t"
    assert credentials.logins("b.example", "x") == []


@pytest.mark.parametrize("name", ["absent", "../../bin/sh", "", 7])
def test_a_helper_that_is_not_there_is_done_without(folders: tuple[Path, Path], name: Any) -> None:
    own = {"auths": {"a.example": auth("jane:p")}, "credsStore": name}
    (folders[0] / "config.json").write_text(json.dumps(own))
    assert users(Credentials.default(), "a.example") == ["jane"]


def test_a_secret_starts_no_program(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path / "bin", "store", {"a.example": ("jane", "p")})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    raw = json.dumps({"credsStore": "store"}).encode()
    (folders[1] / "push").mkdir()
    (folders[1] / "push/config.json").write_bytes(raw)
    assert users(Credentials.default(), "a.example") == users(Credentials.from_dockerconfig(raw), "a.example") == []
