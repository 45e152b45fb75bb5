"""Tokens into text, piece by piece: nothing is shown that a later token, or a stop string, would take back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["TextCollector"]

# So many of the prompt's last tokens are decoded along, for the tokenizers that decide by the token before
# whether a word begins with a space.
CONTEXT_TOKENS = 5
REPLACEMENT = "\ufffd"


class TextCollector:
    """The text of an answer while it is made.

    Each new token is decoded together with the few before it, and the difference is the new text; while that ends in an
    unfinished character (a token may hold half of one) it is kept back. Text that could be the beginning of a stop
    string is kept back too, so that the pieces, joined, are the answer without the stop string.

    `decode` turns token ids into text, `end_tokens` end the answer and are no part of it, `on_text` gets each piece.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        end_tokens: Collection[int] = (),
        on_text: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._end_tokens = frozenset(end_tokens)
        self._on_text = on_text
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._window, self._shown = 0, len(self._ids)
        self._held = ""
        self._pieces: list[str] = []
        self.count = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What was given to `on_text` so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> bool:
        """Take the next token; True when the answer ends with it (an end token or a stop string)."""
        self.count += 1
        if token in self._end_tokens:
            self.stopped = True
            return True
        self._ids.append(token)
        new = self._undecoded()
        if new and not new.endswith(REPLACEMENT):
            self._window, self._shown = self._shown, len(self._ids)
            self._take(new)
        return self.stopped

    def finish(self) -> str:
        """Give out what was kept back, and return the whole text."""
        if (rest := self._undecoded()) and not self._stopped_by_string:
            self._take(rest)
        if not self._stopped_by_string:
            self._emit(self._held)
        self._held = ""
        return self.text

    _stopped_by_string = False

    def _undecoded(self) -> str:
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _take(self, new: str) -> None:
        held = self._held + new
        found = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = self._stopped_by_string = True
            self._held = ""
            self._emit(held[: min(found)])
            return
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        self._emit(held[: len(held) - keep])

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
