"""Image references: Docker's grammar, case by case."""

from __future__ import annotations

import pytest

from kaito_flows.errors import ImageError
from kaito_flows.reference import Reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("me/adapter", "docker.io/me/adapter:latest"),
        ("acr.azurecr.io/kaito/phi3:0.0.1", "acr.azurecr.io/kaito/phi3:0.0.1"),
        ("ACR.azurecr.io/phi3", "ACR.azurecr.io/phi3:latest"),
        ("localhost/a:b", "localhost/a:b"),
        ("127.0.0.1:5000/a/b__c/d-e:V1.2_3", "127.0.0.1:5000/a/b__c/d-e:V1.2_3"),
        ("a/b@sha256:" + "0" * 64, "docker.io/a/b:latest@sha256:" + "0" * 64),
    ],
)
def test_a_reference_is_read_as_docker_reads_it(text: str, expected: str) -> None:
    assert str(Reference.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ubuntu",
        "acr.azurecr.io/IMAGE",
        "a//b",
        "a:",
        "a:b:c",
        "a b",
        "-a/b",
        "a/b@sha256:12",
        "Name/x",
        "a" + "/" * 3,
        "x:" + "t" * 129,
        "a\n",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="not an image reference"):
        Reference.parse(text)


def test_a_repository_in_capitals_gets_the_reason() -> None:
    with pytest.raises(ImageError, match="must be lowercase"):
        Reference.parse("acr.azurecr.io/IMAGE:1")
