"""Chats as token ids, with a mask over what is learned.

A token is learned if it lies in an answer, up to and including the token that ends the turn: the first one after the
answer's words at which generation stops, else the last special token of the turn. Whitespace that the template writes
after it (ChatML's newline) is never asked for, and not learned. A turn that ends in no special token at all gets the
end-of-text token: a model that is not taught to stop does not.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kaito_flows.canonical import canonical_digest
from kaito_flows.dataset.chat import (
    Answer,
    ChatTemplate,
    Rendered,
    fold_system,
    load_template,
    read_json,
    special_tokens,
)
from kaito_flows.dataset.formats import Chat
from kaito_flows.errors import DatasetError

BATCH = 512


@dataclass(frozen=True, slots=True)
class Document:
    """One chat: token ids (int32), and for each whether it is learned (uint8); both `[tokens]`."""

    ids: NDArray[np.int32]
    learned: NDArray[np.uint8]


class ChatTokenizer:
    """A model folder's tokenizer and chat template, without transformers.

    `digest` (`sha256:…`) covers what has an influence on the tokens, and not where the folder lies.

    Raises:
        DatasetError: `no-tokenizer` (no tokenizer.json), `tokenizer-damaged`, `no-chat-template`, `chat-template`.
    """

    def __init__(self, folder: Path, *, pad_token: str | None = None) -> None:
        self.template: ChatTemplate = load_template(folder)
        raw = _tokenizer_json(folder)
        # What the tokenizer was once used with is no property of the model.
        raw |= {"truncation": None, "padding": None}
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(raw))
        except Exception as exc:
            message = f"this tokenizer cannot be read: {exc}"
            raise DatasetError(message, place=str(folder), code="tokenizer-damaged") from exc
        tokens = special_tokens(folder)
        self.eos_id: int | None = self._id(tokens.get("eos_token"))
        self.stop_ids = frozenset(self._stop_ids(folder))
        added: dict[int, Any] = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = self.stop_ids | {number for number, token in added.items() if token.special}
        pad = self._id(pad_token if pad_token is not None else tokens.get("pad_token"))
        # Padding is never learned and never attended to by a document, so that any id does.
        self.pad_id = pad if pad is not None else self.eos_id or 0
        self.digest = "sha256:" + canonical_digest(
            {
                "tokenizer": raw,
                "template": self.template.source,
                "special_tokens": tokens,
                "stop": sorted(self.stop_ids),
                "pad": self.pad_id,
            }
        )

    def _id(self, token: str | None) -> int | None:
        number: int | None = None if token is None else self.tokenizer.token_to_id(token)
        return number

    def _stop_ids(self, folder: Path) -> Iterator[int]:
        if self.eos_id is not None:
            yield self.eos_id
        for name in ("generation_config.json", "config.json"):
            written = read_json(folder / name).get("eos_token_id")
            yield from [i for i in (written if isinstance(written, list) else [written]) if isinstance(i, int)]

    def folded(self, chat: Chat) -> Chat:
        """Return the chat as the template can take it: system messages folded where it knows no such role."""
        if self.template.takes_system or all(m["role"] != "system" for m in chat.messages):
            return chat
        return fold_system(chat)

    def encode(self, rendered: Sequence[Rendered]) -> Iterator[Document]:
        """Tokenise rendered chats, in order."""
        for start in range(0, len(rendered), BATCH):
            batch = rendered[start : start + BATCH]
            encodings = self.tokenizer.encode_batch([r.text for r in batch], add_special_tokens=False)
            for chat, encoding in zip(batch, encodings, strict=True):
                yield self._document(chat, encoding.ids, encoding.offsets)

    def _document(self, chat: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Document:
        learned = np.zeros(len(ids) + 1, np.uint8)
        last, stops = 0, True
        for answer in chat.answers:
            first, last, stops = self._span(answer, chat.text, ids, offsets)
            learned[first:last] = 1
        if not stops and self.eos_id is not None and not chat.text[chat.answers[-1].end :].strip():
            ids = [*ids[:last], self.eos_id]
            learned[last] = 1
        return Document(np.array(ids, np.int32), learned[: len(ids)])

    def _span(self, answer: Answer, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[int, int, bool]:
        """Return first and last (exclusive) learned token of an answer, and whether it ends in a special token."""
        first = bisect_right(offsets, answer.start, key=_end)
        # A token across the border is the answer's if only whitespace of it is the prompt's ("Assistant: " + "hello").
        if first < len(ids) and text[offsets[first][0] : answer.start].strip():
            first += 1
        last = max(bisect_right(offsets, answer.end, key=_end), first)
        words = min(max(bisect_left(offsets, answer.content_end, key=_begin), first), last)
        after = ids[words:last]
        for index, number in enumerate(after):
            if number in self.stop_ids:
                return first, words + index + 1, True
        special = [index for index, number in enumerate(after) if number in self.special_ids]
        if special:
            return first, words + special[-1] + 1, True
        if last < len(ids) and ids[last] in self.stop_ids:
            # A block that the template marked without its end token.
            return first, last + 1, True
        return first, last if answer.closed else words, False


_begin, _end = itemgetter(0), itemgetter(1)


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    raw = read_json(folder / "tokenizer.json")
    if not raw:
        hint = "a fast tokenizer is needed: save the model's with transformers' AutoTokenizer"
        raise DatasetError("no tokenizer.json", place=str(folder), hint=hint, code="no-tokenizer")
    return raw
