"""The dataset report: what a person wants to see before a GPU is paid for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from kaito_flows.dataset.packing import Packed
from kaito_flows.dataset.tokens import ChatTokenizer, Document

BAR = 30
SHOWN_TOKENS = 400


def write_report(
    facts: Mapping[str, Any],
    splits: Mapping[str, Packed],
    lengths: Sequence[int],
    example: Document,
    tokenizer: ChatTokenizer,
) -> str:
    """Return the report as Markdown.

    Args:
        facts: `dataset.json`.
        splits: the packed rows by split.
        lengths: tokens of every chat, before truncation.
        example: the chat that is shown, the first one that is trained on.
        tokenizer: for showing it.
    """
    parts = ["# Dataset", _sources(facts["sources"]), "## Splits", _splits(splits), *_notes(facts, lengths)]
    parts += ["## Length of the chats", _histogram(lengths)]
    parts += ["## What is learned", "The first chat as the model sees it; the **bold** part is learned."]
    parts += [_example(example, facts["sequence_length"], tokenizer)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [[_escape(s["url"]), _size(s["bytes"]), f"{s['rows']:,}", f"`{s['sha256'][:12]}`"] for s in sources]
    return _table(["source", "size", "chats", "sha256"], rows)


def _splits(splits: Mapping[str, Packed]) -> str:
    head = ["split", "chats", "rows", "tokens", "learned tokens", "rows filled"]
    rows = [
        [
            name,
            f"{p.documents:,}",
            f"{p.input_ids.shape[0]:,} × {p.input_ids.shape[1]:,}",
            f"{p.tokens:,}",
            f"{p.trained_tokens:,} ({p.trained_tokens / p.tokens:.0%})",
            f"{p.efficiency:.1%}",
        ]
        for name, p in splits.items()
    ]
    return _table(head, rows)


def _notes(facts: Mapping[str, Any], lengths: Sequence[int]) -> list[str]:
    length, total = facts["sequence_length"], len(lengths)
    notes = []
    if facts["truncated_documents"]:
        notes.append(f"- {facts['truncated_documents']:,} of {total:,} chats were cut off at {length:,} tokens.")
    if facts["dropped_documents"]:
        dropped = f"{facts['dropped_documents']:,} of {total:,} chats"
        notes.append(f"- {dropped} were left out: their answers begin after {length:,} tokens.")
    if facts["duplicate_documents"]:
        notes.append(f"- {facts['duplicate_documents']:,} chats repeat another one; equal chats are in the same split.")
    if facts["unlearned_turns"]:
        notes.append(
            f"- {facts['unlearned_turns']:,} earlier answers are not learned: "
            "the chat template writes them differently once they are past."
        )
    if facts["system_folded"]:
        notes.append("- The chat template has no system role: system messages stand at the head of the user's message.")
    if "validation" not in facts["splits"]:
        notes.append("- Nothing is held out, so that the adapter cannot be compared with the base model.")
    return ["\n".join(notes)] if notes else []


def _histogram(lengths: Sequence[int]) -> str:
    values = np.asarray(lengths)
    top = int(values.max())
    edges = [0]
    while edges[-1] < top:
        edges.append(max(16, edges[-1] * 2))
    counts = [int(((values > low) & (values <= high)).sum()) for low, high in pairwise(edges)]
    first = next(index for index, count in enumerate(counts) if count)
    rows = [
        [f"{edges[i] + 1:,} to {edges[i + 1]:,}", f"{counts[i]:,}", "█" * -(-counts[i] * BAR // max(counts))]
        for i in range(first, len(counts))
    ]
    lines = [f"{'tokens':>18}  {'chats':>9}"] + [f"{a:>18}  {b:>9}  {c}".rstrip() for a, b, c in rows]
    low, middle, high = (int(q) for q in np.quantile(values, [0.05, 0.5, 0.95], method="inverted_cdf"))
    words = f"Median {middle:,} tokens, 5 % up to {low:,}, 95 % up to {high:,}, longest {top:,}."
    return "```text\n" + "\n".join(lines) + "\n```\n\n" + words


def _example(document: Document, length: int, tokenizer: ChatTokenizer) -> str:
    ids, learned = document.ids[:length], document.learned[:length]
    # What leads up to the first answer is more telling than the head of a long prompt.
    start = max(0, int(np.argmax(learned)) - SHOWN_TOKENS // 2)
    end = min(len(ids), start + SHOWN_TOKENS)
    text = "… " if start else ""
    borders = np.flatnonzero(np.diff(learned[start:end])) + 1
    for run in np.split(np.arange(start, end), borders):
        piece = tokenizer.tokenizer.decode(ids[run].tolist(), skip_special_tokens=False)
        text += "\n".join(_bold(line) if learned[run[0]] else _escape(line) for line in piece.split("\n"))
    text += " …" if end < len(ids) else ""
    return "\n".join(f"> {line}\\" if line.strip() else ">" for line in text.split("\n")).rstrip(">\\\n ") + "\n"


def _bold(line: str) -> str:
    words = line.strip()
    if not words:
        return line
    head, tail = line[: len(line) - len(line.lstrip())], line[len(line.rstrip()) :]
    return f"{head}**{_escape(words)}**{tail}"


def _escape(text: str) -> str:
    """Return text out of the data such that Markdown shows it and nothing more."""
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", "␍")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", shown)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
