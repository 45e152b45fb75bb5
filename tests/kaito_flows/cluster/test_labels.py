"""Names and labels that fit, whatever they are made of."""

from __future__ import annotations

import re

import pytest

from kaito_flows.cluster.labels import label_value, labels, object_name, selector

DNS_1123 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?")


def test_a_name_that_fits_is_left_as_it_is() -> None:
    assert object_name("phi-3", "tuner", "0123456789ab") == "phi-3-tuner-0123456789ab"
    assert object_name("a" * 63) == "a" * 63


@pytest.mark.parametrize(
    "parts",
    [("w" * 63, "tuner"), ("a-" * 31 + "a", "x"), ("UPPER_case.dots",), ("3-digits",), ("-",), ("", ""), ("ü", "é")],
)
def test_any_name_becomes_one_that_kubernetes_takes(parts: tuple[str, ...]) -> None:
    name = object_name(*parts)
    assert DNS_1123.fullmatch(name), name
    assert len(name) <= 63
    assert name == object_name(*parts)


def test_names_that_are_cut_stay_apart() -> None:
    long = "w" * 62
    names = {object_name(long + end, part) for end in "ab" for part in ("tuner", "server")}
    assert len(names) == 4
    assert {len(name) for name in names} == {63}
    assert len(object_name(long, "tuner", max_length=52)) == 52
    assert object_name("a.b") != object_name("a-b") != object_name("A-b")


def test_labels_of_a_workspace_find_it_again() -> None:
    for workspace in ("phi-3", "w" * 63, "w" * 80, "not valid!"):
        found = labels(workspace, "tuner", "run 1")
        assert all(LABEL.fullmatch(value) and len(value) <= 63 for value in found.values())
        for wanted in (selector(workspace), selector(workspace, "tuner"), selector(workspace, "tuner", "run 1")):
            assert wanted.items() <= found.items()
        assert not selector(workspace, "server").items() <= found.items()
    assert labels("phi-3", "tuner")["kaito.sh/workspace"] == "phi-3"
    assert "kaito-flows/run-id" not in labels("phi-3", "tuner")
    assert label_value("w" * 80) != label_value("w" * 81)
