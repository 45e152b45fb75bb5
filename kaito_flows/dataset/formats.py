"""Read chats out of the files that people have: parquet, Arrow, JSON lines, JSON and CSV.

The kind of file is told by its first bytes, never by its name. A row is a chat in one of two forms:

    messages              [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]; answers are learned
    prompt, completion    "…", "…", or lists of messages; only the completion is learned

`messages` may also be JSON text, as CSV needs it. KAITO's `messages_column`, or `context_column` and `response_column`,
name columns that are called otherwise.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from kaito_flows.dataset.download import SourceFile
from kaito_flows.errors import DatasetError

ROLES = ("system", "user", "assistant")
BATCH_ROWS = 4096
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Chat:
    """One row: messages with a role of `ROLES` and text; assistant turns from index `learn_from` on are learned.

    The last message is the assistant's: what comes after the last answer teaches nothing and is left out.
    """

    messages: list[Message]
    learn_from: int
    row: int


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a user names; None where the usual names hold."""

    messages: str | None = None
    context: str | None = None
    response: str | None = None

    def choose(self, found: Iterable[str], place: str) -> tuple[str, ...]:
        """Return the column of messages, or the two of prompt and completion.

        Raises:
            DatasetError: (`dataset-columns`) none of them is there.
        """
        have = list(found)
        named = [name for name in (self.messages, self.context, self.response) if name is not None]
        missing = [name for name in named if name not in have]
        if missing:
            hint = "DatasetConfig names a column that the file does not have"
            raise _columns_error(f"no column {missing[0]!r}", have, place, hint)
        if self.messages is not None:
            return (self.messages,)
        if named:
            pair = (self.context or "prompt", self.response or "completion")
        elif "messages" in have:
            return ("messages",)
        else:
            pair = ("prompt", "completion")
        if not set(pair) <= set(have):
            wanted = f"{pair[0]} and {pair[1]}" if named else "messages, or prompt and completion"
            hint = (
                f"accepted: {wanted}; DatasetConfig's messages_column, context_column and response_column name others"
            )
            raise _columns_error("no column that holds chats", have, place, hint)
        return pair


def _columns_error(message: str, have: list[str], place: str, hint: str) -> DatasetError:
    shown = ", ".join(map(repr, have[:20])) + (f" and {len(have) - 20} more" if len(have) > 20 else "")
    return DatasetError(f"{message}; found {shown or 'none'}", place=place, hint=hint, code="dataset-columns")


def read_chats(source: SourceFile, columns: Columns) -> list[Chat]:
    """Return every row of the file as a chat.

    Raises:
        DatasetError: `dataset-columns`, `dataset-empty` (no rows), `dataset-damaged`, `dataset-format` (another kind of
            file), `dataset-row` (a row that is not a chat: names the first one, and says how many there are).
    """
    chats: list[Chat] = []
    wrong: list[tuple[int, str]] = []
    for row, cells in _rows(source, columns):
        try:
            chats.append(_chat(cells, row))
        except _NotAChatError as exc:
            wrong.append((row, str(exc)))
    if wrong:
        row, message = wrong[0]
        more = f"; {len(wrong) - 1} more rows are not chats either" if len(wrong) > 1 else ""
        raise row_error(source.url, row, message + more)
    if not chats:
        hint = "was it written to its end?"
        raise DatasetError("the file has no rows", place=source.url, hint=hint, code="dataset-empty")
    return chats


def row_error(url: str, row: int, message: str) -> DatasetError:
    """Return the error for a row (counted from 1) that cannot be used."""
    hint = "a row needs messages with a role (system, user, assistant) and text, one of them the assistant's"
    return DatasetError(message, place=f"{url}: row {row}", hint=hint, code="dataset-row")


class _NotAChatError(Exception):
    """What is wrong with a row."""


def _chat(cells: tuple[Any, ...], row: int) -> Chat:
    if len(cells) == 1:
        messages, learn_from = _messages(cells[0], "messages"), 0
    else:
        asked = _turns(cells[0], "prompt", "user")
        messages, learn_from = asked + _turns(cells[1], "completion", "assistant"), len(asked)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= learn_from]
    if not answers:
        raise _NotAChatError("no assistant turn, so nothing to learn")
    return Chat(messages[: answers[-1] + 1], learn_from, row)


def _turns(cell: Any, name: str, role: str) -> list[Message]:
    if isinstance(cell, str):
        return [_message({"role": role, "content": cell}, name)]
    return _messages(cell, name)


def _messages(cell: Any, name: str) -> list[Message]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError as exc:
            raise _NotAChatError(f"{name} is text, but not JSON") from exc
    if cell is None:
        raise _NotAChatError(f"{name} is null")
    if not isinstance(cell, list):
        raise _NotAChatError(f"{name} is {_kind(cell)}, not a list of messages")
    if not cell:
        raise _NotAChatError(f"{name} is empty")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(cell)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise _NotAChatError(f"{place} is {_kind(item)}, not a message with role and content")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        what = "no role" if role is None else f"the unknown role {str(role)[:40]!r}"
        raise _NotAChatError(f"{place} has {what}")
    if item.get("tool_calls"):
        raise _NotAChatError(f"{place} has tool calls, which are not supported")
    if not isinstance(content, str):
        what = "no content" if content is None else f"content that is {_kind(content)}, not text"
        raise _NotAChatError(f"{place} has {what}")
    if role == "assistant" and not content.strip():
        raise _NotAChatError(f"{place} is an empty answer")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError as exc:
            raise _NotAChatError(f"{place} has half of a surrogate pair, which is not text") from exc
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}") if value is not None else "null"


def _rows(source: SourceFile, columns: Columns) -> Iterator[tuple[int, tuple[Any, ...]]]:
    with source.path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        yield from _arrow_rows(_parquet_batches(source, columns), columns, source.url)
    elif head.startswith(b"ARROW1"):
        yield from _arrow_rows(_ipc_batches(source), columns, source.url)
    else:
        yield from _text_rows(source, head, columns)


def _parquet_batches(source: SourceFile, columns: Columns) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(source.path, page_checksum_verification=True) as file:
            chosen = columns.choose(file.schema_arrow.names, source.url)
            # One row group at a time: pyarrow cannot join those of nested columns with dictionaries.
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(chosen), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise _damaged(source, "parquet", exc) from exc


def _ipc_batches(source: SourceFile) -> Iterator[pa.RecordBatch]:
    try:
        with pa.ipc.open_file(source.path) as file:
            columns = file.schema.names
            for index in range(file.num_record_batches):
                yield file.get_batch(index).select(columns)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise _damaged(source, "Arrow", exc) from exc


def _damaged(source: SourceFile, kind: str, exc: Exception) -> DatasetError:
    said = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
    if isinstance(exc, pa.ArrowNotImplementedError):
        hint = "write it with columns of plain text, or of lists of role and content"
        message = f"this {kind} file cannot be read here: {said}"
        return DatasetError(message, place=source.url, hint=hint, code="dataset-format")
    message = f"this {kind} file is damaged: {said}"
    return DatasetError(message, place=source.url, hint="write or fetch it again", code="dataset-damaged")


def _arrow_rows(
    batches: Iterator[pa.RecordBatch], columns: Columns, place: str
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    row = 0
    for batch in batches:
        chosen = columns.choose(batch.schema.names, place)
        try:
            values = [_python(batch.column(name)) for name in chosen]
        except UnicodeDecodeError as exc:
            message = f"text that is not UTF-8 after row {row}"
            raise DatasetError(message, place=place, hint="write text in UTF-8", code="dataset-damaged") from exc
        for cells in zip(*values, strict=True):
            row += 1
            yield row, cells


def _python(array: pa.Array) -> list[Any]:
    """Return the array as Python values; a list of structs field by field, which is several times faster."""
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return list(array.to_pylist())
    items = array.flatten()
    if not pa.types.is_struct(items.type):
        return list(array.to_pylist())
    names = [field.name for field in items.type]
    fields = [items.field(index).to_pylist() for index in range(len(names))]
    flat: list[Any] = [dict(zip(names, cells, strict=True)) for cells in zip(*fields, strict=True)]
    if items.null_count:
        flat = [item if valid else None for item, valid in zip(flat, items.is_valid().to_pylist(), strict=True)]
    values: list[Any] = []
    start = 0
    for count in array.value_lengths().to_pylist():
        values.append(None if count is None else flat[start : start + count])
        start += count or 0
    return values


def _text_rows(source: SourceFile, head: bytes, columns: Columns) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            hint = "unpack it: parquet, Arrow, JSON lines, JSON and CSV are read"
            raise DatasetError(f"a {kind} archive", place=source.url, hint=hint, code="dataset-format")
    if b"\0" in head:
        hint = "parquet, Arrow, JSON lines, JSON and CSV are read"
        raise DatasetError("neither parquet nor text", place=source.url, hint=hint, code="dataset-format")
    try:
        with source.path.open(encoding="utf-8-sig", newline="") as file:
            first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if first == b"{":
                yield from _json_rows(_json_lines(file, source), columns, source.url)
            elif first == b"[":
                yield from _json_rows(_json_array(file, source), columns, source.url)
            else:
                yield from _csv_rows(file, source, columns)
    except UnicodeDecodeError as exc:
        hint = "write text files in UTF-8"
        raise DatasetError("not UTF-8 text", place=source.url, hint=hint, code="dataset-damaged") from exc


def _json_lines(file: TextIO, source: SourceFile) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as exc:
            hint = "write one JSON object a line"
            place = f"{source.url}: line {number}"
            raise DatasetError(f"not JSON: {exc}", place=place, hint=hint, code="dataset-damaged") from exc


def _json_array(file: TextIO, source: SourceFile) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.load(file), 1)
    except (ValueError, RecursionError) as exc:
        raise DatasetError(f"not JSON: {exc}", place=source.url, code="dataset-damaged") from exc


def _json_rows(
    values: Iterator[tuple[int, Any]], columns: Columns, place: str
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    chosen: tuple[str, ...] | None = None
    for number, value in values:
        if not isinstance(value, dict):
            raise row_error(place, number, f"the row is {_kind(value)}, not an object")
        chosen = chosen or columns.choose(value, place)
        # A key that a later row lacks is null there, as in a table.
        yield number, tuple(value.get(name) for name in chosen)


def _csv_rows(file: TextIO, source: SourceFile, columns: Columns) -> Iterator[tuple[int, tuple[Any, ...]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        chosen = [header.index(name) for name in columns.choose(header, source.url)]
        for row, cells in enumerate(filter(None, reader), 1):
            yield row, tuple(cells[index] if index < len(cells) else None for index in chosen)
    except csv.Error as exc:
        place = f"{source.url}: line {reader.line_num}"
        raise DatasetError(f"not CSV: {exc}", place=place, code="dataset-damaged") from exc
