"""Two Workspaces with one output: who has published keeps the tag, else who was there first."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.errors import InputError
from kaito_flows.platforms.outputs import check_output

IMAGE = "registry.example/team/adapter"


def workspace(name: str, created: int, *, image: str = IMAGE, state: str = "Running", published: str = "") -> Any:
    metadata = {"name": name, "creationTimestamp": f"2026-01-01T00:00:{created:02d}Z"}
    status = {"state": state, **({"adapter": {"image": published}} if published else {})}
    return {"metadata": metadata, "tuning": {"output": {"image": image}}, "status": status}


def loser(*workspaces: Any) -> list[str]:
    """Which of the Workspaces are refused, with the one that each is refused for."""
    refused = []
    for one in workspaces:
        try:
            check_output(workspaces, one["metadata"]["name"], one["tuning"]["output"]["image"])
        except InputError as exc:
            assert exc.code == "output-taken"
            assert exc.hint
            refused.append(f"{one['metadata']['name']} for {exc.message.split()[2]}")
    return refused


def test_the_one_that_was_there_first_keeps_the_tag() -> None:
    assert loser(workspace("b", 1), workspace("a", 2)) == ["a for b"]


def test_of_two_that_were_applied_at_once_one_keeps_the_tag() -> None:
    assert loser(workspace("b", 1), workspace("a", 1)) == ["b for a"]


def test_the_same_tag_may_be_spelt_in_two_ways() -> None:
    assert loser(workspace("a", 1), workspace("b", 2, image=f"{IMAGE}:latest")) == ["b for a"]


def test_the_one_that_has_published_keeps_the_tag_from_an_older_one_that_was_edited() -> None:
    assert loser(workspace("a", 1), workspace("b", 2, published=IMAGE)) == ["a for b"]


def test_one_that_has_failed_has_no_claim_until_it_has_published() -> None:
    assert loser(workspace("a", 1, state="Failed"), workspace("b", 2)) == []
    assert loser(workspace("a", 1, state="Failed", published=IMAGE), workspace("b", 2)) == ["b for a"]


@pytest.mark.parametrize(
    "other",
    [
        workspace("other", 1, image=f"{IMAGE}:v2"),
        workspace("other", 1, image="NOT an image"),
        {"metadata": {"name": "other", "creationTimestamp": "2026-01-01T00:00:01Z"}, "inference": {}},
        {**workspace("other", 1), "metadata": {"name": "other", "deletionTimestamp": "2026-01-01T00:00:09Z"}},
    ],
)
def test_others_are_no_rivals(other: Any) -> None:
    check_output([other, workspace("a", 2)], "a", IMAGE)
