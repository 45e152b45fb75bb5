"""A real registry that takes tokens only: whoever has a login of any kind gets the one that is needed, and no more."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import httpx
import pytest

from kaito_flows.errors import AccessError, RegistryError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image, read_file
from kaito_flows.oci.registry import RegistryRepository
from kaito_flows.oci.tokens import Challenge

from .conftest import GUID, REFRESH_TOKEN, TokenRegistry

FILES = [{"data/a": b"1"}]


def with_login(registry: TokenRegistry, entry: dict[str, str] | None, name: str = "team/x") -> RegistryRepository:
    auths = {registry.host: entry} if entry else {}
    return RegistryRepository(
        registry.host, name, Credentials.from_dockerconfig(json.dumps({"auths": auths}).encode(), place="secret/push")
    )


JANE = {"auth": base64.b64encode(b"jane:with:colon").decode()}
TOKENS: list[Any] = [
    pytest.param(JANE, "GET", id="user and password"),
    pytest.param({"identitytoken": REFRESH_TOKEN, "auth": base64.b64encode(f"{GUID}:".encode()).decode()}, "POST"),
    pytest.param({"username": GUID, "password": REFRESH_TOKEN}, "POST", id="GUID"),
    pytest.param({"username": "<token>", "password": REFRESH_TOKEN}, "POST", id="<token>"),
]


@pytest.mark.registry
@pytest.mark.parametrize(("entry", "method"), TOKENS)
def test_every_kind_of_login_pushes_and_pulls(token_registry: TokenRegistry, entry: Any, method: str) -> None:
    repository = with_login(token_registry, entry)
    image = build_image(repository, FILES, annotations={}, tag="latest")
    assert read_file(image, "data/a") == b"1"
    assert repository.tags() == {"latest": image.digest}
    # One token for all of it.
    assert [(asked["method"], asked["scope"]) for asked in token_registry.tokens.asked] == [
        (method, "repository:team/x:pull,push")
    ]


@pytest.mark.registry
def test_the_right_to_push_is_known_beforehand_and_only_calling_it_off_asks_for_more(
    token_registry: TokenRegistry,
) -> None:
    with_login(token_registry, JANE).probe_push()
    assert token_registry.scopes == ["repository:team/x:pull,push", "repository:team/x:pull,push,delete"]


@pytest.mark.registry
def test_where_tokens_are_not_posted_for_a_refresh_token_goes_as_a_password(token_registry: TokenRegistry) -> None:
    token_registry.takes_posts = False
    build_image(with_login(token_registry, {"identitytoken": REFRESH_TOKEN}), FILES, annotations={}, tag="latest")
    assert {asked["method"] for asked in token_registry.tokens.asked} == {"GET"}


@pytest.mark.registry
def test_a_pull_asks_for_no_more_than_that_and_a_push_after_it_for_both(token_registry: TokenRegistry) -> None:
    repository = with_login(token_registry, JANE)
    assert not repository.has("latest")
    build_image(repository, FILES, annotations={}, tag="latest")
    assert token_registry.scopes == ["repository:team/x:pull", "repository:team/x:pull,push"]


@pytest.mark.registry
def test_a_token_that_ran_out_is_renewed(token_registry: TokenRegistry) -> None:
    # The registry allows for a minute's difference between clocks.
    token_registry.seconds = -58
    repository = with_login(token_registry, JANE)
    build_image(repository, FILES, annotations={}, tag="one")
    time.sleep(2.5)
    token_registry.seconds = 600
    build_image(repository, [{"data/a": b"2"}], annotations={}, tag="two")
    assert set(repository.tags()) == {"one", "two"}
    assert len(token_registry.tokens.asked) >= 2


@pytest.mark.registry
def test_a_login_that_may_only_pull_is_refused_before_anything_is_sent(token_registry: TokenRegistry) -> None:
    image = build_image(with_login(token_registry, JANE), FILES, annotations={}, tag="latest")
    reader = with_login(token_registry, {"username": "reader", "password": "r"})
    assert reader.resolve("latest") == image.digest
    with pytest.raises(AccessError, match=r"push-refused: docker://.*used secret/push"):
        reader.probe_push()
    reader.untag("latest")
    assert reader.resolve("latest") == image.digest


@pytest.mark.registry
def test_untagging_asks_for_the_right_to_delete(token_registry: TokenRegistry) -> None:
    repository = with_login(token_registry, JANE)
    build_image(repository, FILES, annotations={}, tag="latest")
    repository.untag("latest")
    assert repository.tags() == {}
    assert token_registry.scopes[-1] == "repository:team/x:pull,push,delete"


@pytest.mark.registry
def test_what_everybody_may_pull_needs_no_login(token_registry: TokenRegistry) -> None:
    image = build_image(with_login(token_registry, JANE, "public/x"), FILES, annotations={}, tag="latest")
    assert with_login(token_registry, None, "public/x").resolve("latest") == image.digest
    # A login that the token server refuses does not stand in the way.
    wrong = {"username": "jane", "password": "hunter2"}
    assert with_login(token_registry, wrong, "public/x").resolve("latest") == image.digest
    with pytest.raises(AccessError, match="pull-refused"):
        with_login(token_registry, None).resolve("latest")


@pytest.mark.registry
def test_of_several_logins_the_one_that_may_is_found(token_registry: TokenRegistry) -> None:
    auths = {
        f"{token_registry.host}/team": {"username": "reader", "password": "r"},
        token_registry.host: JANE,
    }
    raw = json.dumps({"auths": auths}).encode()
    repository = RegistryRepository(token_registry.host, "team/x", Credentials.from_dockerconfig(raw))
    build_image(repository, FILES, annotations={}, tag="latest")
    # The first one that fits may look, and so is tried again when it comes to sending.
    assert [asked["user"] for asked in token_registry.tokens.asked] == ["reader", "reader", "jane"]


@pytest.mark.registry
def test_a_registry_token_goes_as_it_is(token_registry: TokenRegistry) -> None:
    repository = with_login(token_registry, JANE)
    build_image(repository, FILES, annotations={}, tag="latest")
    asked = {"service": "registry", "scope": "repository:team/x:pull"}
    basic = httpx.BasicAuth("jane", "with:colon")
    realm = f"http://{token_registry.tokens.host}/token"
    token = httpx.get(realm, params=asked, auth=basic, trust_env=False).json()["token"]
    before = len(token_registry.tokens.asked)
    assert with_login(token_registry, {"registrytoken": token}).has("latest")
    assert len(token_registry.tokens.asked) == before


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        (["Negotiate"], None),
        (['Basic realm="x"'], Challenge("basic", "x")),
        (
            ['Bearer realm="https://a/b",service="c",scope="repository:d/e:pull,push"'],
            Challenge("bearer", "https://a/b", "c", "repository:d/e:pull,push"),
        ),
        (['Basic realm="x"', 'bearer Realm="https://a"'], Challenge("bearer", "https://a")),
        (['Bearer realm="https://a", service="s", Basic realm="x"'], Challenge("bearer", "https://a", "s")),
        (["Bearer realm=https://a, service=s"], Challenge("bearer", "https://a", "s")),
    ],
)
def test_challenges_are_read_as_servers_write_them(headers: list[str], expected: Challenge | None) -> None:
    response = httpx.Response(401, headers=[("WWW-Authenticate", value) for value in headers])
    assert Challenge.of(response) == expected


def test_the_scope_is_what_is_wanted_and_what_the_registry_says_for_this_repository() -> None:
    challenge = Challenge("bearer", scope="repository:team/x:delete,pull repository:other/y:push")
    assert challenge.scope_for("team/x", ("pull", "push")) == "repository:team/x:pull,push,delete"
    assert Challenge("bearer").scope_for("team/x", ("pull",)) == "repository:team/x:pull"


def test_no_password_goes_to_a_token_server_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        assert request.url.host == "registry.example"
        return httpx.Response(401, headers={"WWW-Authenticate": 'Bearer realm="http://tokens.example/t"'})

    raw = json.dumps({"auths": {"registry.example": JANE}}).encode()
    repository = RegistryRepository("registry.example", "team/x", Credentials.from_dockerconfig(raw))
    monkeypatch.setattr(repository._session, "_client", httpx.Client(transport=httpx.MockTransport(handle)))
    with pytest.raises(RegistryError, match=re.escape("http://tokens.example/t: the token server has no TLS")):
        repository.probe_push()
