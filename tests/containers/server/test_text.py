from __future__ import annotations

from collections.abc import Sequence

import pytest

from kaito_flows.containers.server.text import TextCollector

END = 1000


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def collect(data: bytes, stop: Sequence[str] = ()) -> tuple[list[str], TextCollector]:
    pieces: list[str] = []
    collector = TextCollector(decode, stop=stop, end_tokens=[END], on_text=pieces.append)
    for byte in data:
        if collector.push(byte):
            break
    collector.finish()
    return pieces, collector


def test_a_character_is_shown_only_when_all_its_tokens_are_there() -> None:
    pieces, collector = collect("aé€😀b".encode())
    assert pieces == ["a", "é", "€", "😀", "b"]
    assert collector.text == "aé€😀b"


def test_half_a_character_at_the_end_is_shown_as_a_replacement() -> None:
    assert collect("a€".encode()[:-1])[1].text == "a\ufffd"


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it() -> None:
    pieces, collector = collect(b"one two three", ["two"])
    assert "".join(pieces) == collector.text == "one "
    assert collector.stopped
    assert collector.count == len("one two")


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    pieces, _ = collect(b"ab##ab###", ["###"])
    assert "".join(pieces) == "ab##ab"
    assert pieces == ["a", "b", "##a", "b"]


def test_what_only_looked_like_a_stop_string_is_shown_after_all() -> None:
    assert collect(b"one tw", ["two"])[1].text == "one tw"
    assert collect(b"aab", ["aaab"])[1].text == "aab"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert collect(b"x END y STOP", ["STOP", "END"])[1].text == "x "


def test_an_end_token_ends_the_answer_without_a_trace() -> None:
    collector = TextCollector(decode, end_tokens=[END])
    assert [collector.push(token) for token in (65, END)] == [False, True]
    assert (collector.finish(), collector.count, collector.stopped) == ("A", 2, True)


def test_a_space_that_depends_on_the_token_before_is_kept() -> None:
    def sentencepiece(tokens: Sequence[int]) -> str:
        return "".join(f" {chr(token)}" for token in tokens).removeprefix(" ")

    collector = TextCollector(sentencepiece, prompt=[65, 66])
    for token in (67, 68):
        collector.push(token)
    assert collector.finish() == " C D"


@pytest.mark.parametrize("stop", [[], ["zz"], ["\n\n", "q"]])
def test_the_pieces_joined_are_the_text_whatever_the_bytes(stop: list[str]) -> None:
    data = bytes((i * 89 + i * i) % 256 for i in range(400) if (i * 89 + i * i) % 256 != ord("q"))
    pieces, collector = collect(data, stop)
    assert "".join(pieces) == collector.text == decode(data)
