from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.dataset.formats import Chat
from kaito_flows.dataset.splitting import split_chats
from kaito_flows.errors import DatasetError


def chats(say: Any, *answers: object) -> list[Chat]:
    return [Chat(say("?", str(answer)), 0, row) for row, answer in enumerate(answers, 1)]


def answers(chats: list[Chat], indices: list[int]) -> list[str]:
    return [chats[i].messages[-1]["content"] for i in indices]


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.9, 10), (1000, 0.93, 70), (10, 0.99, 1), (2, 0.5, 1)])
def test_about_the_share_and_at_least_one_is_held_out(say: Any, count: int, share: float, held: int) -> None:
    split = split_chats(chats(say, *range(count)), train_share=share, shuffle=True, seed=1)
    assert len(split.validation) == held
    assert sorted(split.train + split.validation) == list(range(count))


def test_a_tiny_share_still_leaves_something_to_train_on(say: Any) -> None:
    assert len(split_chats(chats(say, 1, 2, 3), train_share=0.01, shuffle=True, seed=1).train) == 1


def test_a_share_of_one_holds_nothing_out(say: Any) -> None:
    split = split_chats(chats(say, 1, 1), train_share=1, shuffle=False, seed=1)
    assert (split.train, split.validation, split.duplicates) == ([0, 1], [], 1)


def test_equal_chats_are_never_on_both_sides(say: Any) -> None:
    data = chats(say, *(n % 37 for n in range(500)))
    for seed in range(30):
        split = split_chats(data, train_share=0.8, shuffle=True, seed=seed)
        assert not set(answers(data, split.train)) & set(answers(data, split.validation))
        assert 1 <= len(split.validation) <= 100
        assert split.duplicates == 500 - 37


def test_chats_that_are_all_repeated_are_split_by_the_rarest(say: Any) -> None:
    data = chats(say, *"aaaaaaaaabbbbbcc")
    split = split_chats(data, train_share=0.99, shuffle=False, seed=0)
    assert set(answers(data, split.validation)) == {"c"}


def test_order_is_kept_unless_shuffling_is_asked_for(say: Any) -> None:
    data = chats(say, *range(50))
    kept = split_chats(data, train_share=0.8, shuffle=False, seed=1)
    assert kept.train == sorted(kept.train)
    shuffled = split_chats(data, train_share=0.8, shuffle=True, seed=1)
    assert shuffled.train != sorted(shuffled.train)
    assert sorted(shuffled.train) == kept.train


def test_the_seed_decides_and_the_order_of_files_does_not(say: Any) -> None:
    data = chats(say, *range(50))
    turned = data[::-1]
    one, other = (split_chats(d, train_share=0.8, shuffle=True, seed=1) for d in (data, turned))
    assert answers(data, one.train) == answers(turned, other.train)
    assert split_chats(data, train_share=0.8, shuffle=True, seed=2).validation != one.validation


def test_chats_that_differ_only_in_what_is_learned_are_not_equal(say: Any) -> None:
    pair = [Chat(say("a", "b", "c", "d"), learn_from, 1) for learn_from in (0, 2)]
    assert split_chats(pair, train_share=1, shuffle=True, seed=1).duplicates == 0


@pytest.mark.parametrize("same", [["a"], ["a", "a", "a"]])
def test_nothing_can_be_held_out_of_one_chat(say: Any, same: list[str]) -> None:
    with pytest.raises(DatasetError) as caught:
        split_chats(chats(say, *same), train_share=0.9, shuffle=True, seed=1)
    assert caught.value.code == "dataset-too-small"
