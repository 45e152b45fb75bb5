"""Which chats are held out, and in which order the others are learned: by seed and content alone.

Chats are ranked by a hash of seed and content. Equal chats have equal ranks, so that none is on both sides, and neither
the order of files nor a library's random numbers have a say.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kaito_flows.dataset.formats import Chat
from kaito_flows.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the chats to train on and of those held out, each in its order; and how many repeat an earlier one."""

    train: list[int]
    validation: list[int]
    duplicates: int


def split_chats(chats: Sequence[Chat], *, train_share: float, shuffle: bool, seed: int) -> Split:
    """Split chats so that about `1 - train_share` of them, and at least one, are held out; a share of 1 holds out none.

    Order: by rank if `shuffle`, else as given.

    Raises:
        DatasetError: (`dataset-too-small`) there are not two different chats to split.
    """
    ranks = [_rank(chat, seed) for chat in chats]
    sizes = Counter(ranks)
    held = _held_out(sizes, len(chats), train_share) if train_share < 1 else set()
    order = sorted(range(len(chats)), key=lambda i: (ranks[i], i)) if shuffle else range(len(chats))
    return Split(
        train=[i for i in order if ranks[i] not in held],
        validation=[i for i in order if ranks[i] in held],
        duplicates=len(chats) - len(sizes),
    )


def _rank(chat: Chat, seed: int) -> bytes:
    content = json.dumps([chat.learn_from, *((m["role"], m["content"]) for m in chat.messages)])
    return hashlib.blake2b(content.encode(), digest_size=16, key=str(seed).encode()).digest()


def _held_out(sizes: Counter[bytes], total: int, train_share: float) -> set[bytes]:
    if len(sizes) < 2:
        hint = "add chats, or set train_test_split to 1 to hold nothing out"
        message = f"{total} chat(s), all the same: nothing can be held out for validation"
        raise DatasetError(message, hint=hint, code="dataset-too-small")
    wanted = max(1, round(total * (1 - train_share)))
    held: set[bytes] = set()
    count = 0
    for rank in sorted(sizes):
        if count + sizes[rank] <= wanted and len(held) + 1 < len(sizes):
            held.add(rank)
            count += sizes[rank]
    # Every chat is there more often than there is room for: take the rarest.
    return held or {min(sizes, key=lambda rank: (sizes[rank], rank))}
