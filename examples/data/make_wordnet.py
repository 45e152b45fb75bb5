"""Make `wordnet-definitions.parquet` out of WordNet 3.0: chats that ask for a definition, and its own gloss as answer.

    apt-get install wordnet-base
    python make_wordnet.py /usr/share/wordnet

A noun is taken if its most frequent sense has it as a headword in lower case and of one or two parts, if a person has
met it in running text (WordNet counts that), and if its gloss, up to the first semicolon, has 20 to 90 characters.
Words that WordNet itself calls offensive are left out. Of those, ROWS are drawn by a hash of the word, so that the
same WordNet always gives the same file. `lighthouse` is left out, so that one can ask a tuned model for it.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 900
SEED = 42
SYSTEM = "You are a dictionary."
ASKED_FOR = {"lighthouse"}
OFFENSIVE = re.compile(
    r"offensive|derogat|disparag|ethnic|slur|obscen|vulgar|profan|insult|contempt|sexual|genital|prostitut|excre", re.I
)


def first_senses(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each noun that was met in text, with the offset of its most frequent sense (wndb(5WN): index file)."""
    for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        pointers = int(fields[3])
        met_in_text, offset = int(fields[5 + pointers]), fields[6 + pointers]
        if met_in_text:
            yield fields[0], offset


def synsets(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return headwords and gloss of each noun synset by its offset (wndb(5WN): data file)."""
    found = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
        found[fields[0]] = (words, gloss.strip())
    return found


def definitions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every word that can be taken, with its definition."""
    senses = synsets(folder)
    for word, offset in first_senses(folder):
        words, gloss = senses[offset]
        definition = gloss.partition(";")[0].strip()
        plain = re.fullmatch(r"[a-z]{3,}(_[a-z]{2,})?", word) is not None and word in words
        if plain and 20 <= len(definition) <= 90 and '"' not in definition and not OFFENSIVE.search(gloss):
            yield word.replace("_", " "), definition


def chats(folder: Path) -> list[list[dict[str, str]]]:
    """Return the chosen chats, in the order of their hashes."""

    def rank(word: str) -> bytes:
        return hashlib.sha256(f"{SEED} {word}".encode()).digest()

    pool = {word: definition for word, definition in definitions(folder) if word not in ASKED_FOR}
    return [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Define {word}."},
            {"role": "assistant", "content": pool[word]},
        ]
        for word in sorted(pool, key=rank)[:ROWS]
    ]


def main() -> None:
    """Write the parquet file beside this script, or where told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="WordNet's folder, with index.noun and data.noun")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("wordnet-definitions.parquet"))
    arguments = parser.parse_args()
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    table = pa.table({"messages": pa.array(chats(arguments.folder), pa.list_(message))})
    pq.write_table(table, arguments.output, compression="zstd")


if __name__ == "__main__":
    main()
