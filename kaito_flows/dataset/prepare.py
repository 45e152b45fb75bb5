"""The dataset image: files in, rows of tokens out, under a name that the same inputs always have.

    data/train.safetensors        input_ids int32, loss_mask uint8, position_ids int32, each [rows, length]
    data/validation.safetensors   the same, unless nothing is held out
    data/dataset.json             the facts
    data/samples.json             up to three chats and their answers, held out where there are any
    data/report.md                the report for people

Its key is a hash of the files' names and contents, the tokenizer and the parameters. An image with that key is not made
again; one that is made elsewhere out of the same has the same digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from kaito_flows.canonical import canonical_digest, canonical_json
from kaito_flows.dataset.chat import Rendered, TemplateError, UnplacedError
from kaito_flows.dataset.download import SourceFile, sha256_of
from kaito_flows.dataset.formats import Chat, Columns, read_chats, row_error
from kaito_flows.dataset.packing import Packed, pack
from kaito_flows.dataset.report import write_report
from kaito_flows.dataset.splitting import split_chats
from kaito_flows.dataset.tokens import ChatTokenizer, Document
from kaito_flows.dataset.urls import recorded_url
from kaito_flows.errors import ConfigError, DatasetError, ImageError
from kaito_flows.oci.images import Image, build_image, find_image, read_file
from kaito_flows.oci.repository import Repository

FORMAT_VERSION = 1
PREPARATION_VERSION = 1
"""Goes up when the same inputs would give other tokens than before."""

KEY_ANNOTATION = "io.kaito-flows.dataset-key"
SAMPLES = 3
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class DatasetParameters:
    """How a dataset is made.

    Args:
        max_length: tokens in a row.
        packing: several chats in a row.
        shuffle: train in an order drawn by `seed`, else in the files' order.
        seed: for the order, and for which chats are held out.
        train_share: the share that is trained on, in (0, 1]; 1 holds nothing out.
        messages_column, context_column, response_column: columns, where they have other names than usual.

    Raises:
        ConfigError: a value that cannot be.
    """

    max_length: int
    packing: bool = True
    shuffle: bool = True
    seed: int = 42
    train_share: float = 1.0
    messages_column: str | None = None
    context_column: str | None = None
    response_column: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.train_share <= 1:
            place, hint = "DatasetConfig.train_test_split", "the share to train on, such as 0.9; 1 holds nothing out"
            raise ConfigError(f"{self.train_share} is not above 0 and at most 1", place=place, hint=hint)
        if self.max_length < 8:
            raise ConfigError(f"{self.max_length} tokens hold no chat", place="TrainingArguments.max_length")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DatasetParameters:
        """Take from a resolved training config, section by section, what the dataset depends on."""
        data, arguments = config["DatasetConfig"], config["TrainingArguments"]
        return cls(
            max_length=arguments["max_length"],
            packing=arguments["packing"],
            shuffle=data["shuffle_dataset"],
            seed=data["shuffle_seed"],
            train_share=data["train_test_split"],
            messages_column=data["messages_column"],
            context_column=data["context_column"],
            response_column=data["response_column"],
        )


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """A dataset image, its facts (`dataset.json`), and whether it was there already."""

    image: Image
    facts: dict[str, Any]
    reused: bool


def dataset_key(sources: Sequence[SourceFile], tokenizer_digest: str, parameters: DatasetParameters) -> str:
    """Return the 64 hex digits by which a dataset made of these inputs is found again."""
    return canonical_digest(
        {
            "preparation": PREPARATION_VERSION,
            "sources": [{"url": recorded_url(s.url), "sha256": s.sha256} for s in sources],
            "tokenizer": tokenizer_digest,
            "parameters": asdict(parameters),
        }
    )


def prepare_dataset(
    sources: Sequence[SourceFile],
    tokenizer_folder: Path,
    parameters: DatasetParameters,
    repository: Repository,
    *,
    pad_token: str | None = None,
) -> PreparedDataset:
    """Return the dataset image of these inputs out of the repository, made now if it is not there yet.

    Args:
        sources: the files, from `fetch`.
        tokenizer_folder: the model folder: tokenizer.json, tokenizer_config.json, the chat template.
        parameters: how it is made.
        repository: where the image is looked for, and goes.
        pad_token: instead of the tokenizer's own.

    Raises:
        DatasetError: what `read_chats` and `ChatTokenizer` raise, and `dataset-too-small` (nothing can be held out),
            `dataset-too-long` (no answer begins within `max_length`), `dataset-changed` (a file changed meanwhile),
            `chat-template` (the template's answers cannot be told from the rest).
        DiskFullError: no space left.
    """
    if not sources:
        raise DatasetError("no files", hint="name at least one in tuning.input.urls", code="dataset-empty")
    tokenizer = ChatTokenizer(tokenizer_folder, pad_token=pad_token)
    key = dataset_key(sources, tokenizer.digest, parameters)
    tag = f"dataset-{key[:12]}"
    found = _find(repository, tag, key)
    if found is not None:
        return PreparedDataset(found, json.loads(read_file(found, "data/dataset.json")), reused=True)
    facts, files = _make(sources, tokenizer, parameters)
    image = build_image(repository, [files], annotations={KEY_ANNOTATION: key}, tag=tag)
    return PreparedDataset(image, facts, reused=False)


def _find(repository: Repository, tag: str, key: str) -> Image | None:
    if not repository.has(tag):
        return None
    try:
        image = find_image(repository, tag)
    except ImageError:
        return None
    return image if image.annotations.get(KEY_ANNOTATION) == key else None


@dataclass(slots=True)
class _Corpus:
    """Every chat of every file and the same as tokens, the rows of each file, and how many answers were not placed."""

    chats: list[Chat] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    unplaced: int = 0


def _make(
    sources: Sequence[SourceFile], tokenizer: ChatTokenizer, parameters: DatasetParameters
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """Return the facts, and the image's files."""
    corpus = _read(sources, tokenizer, parameters)
    length = parameters.max_length
    usable = [i for i, document in enumerate(corpus.documents) if document.learned[1:length].any()]
    if not usable:
        message = f"every chat's first answer begins after {length} tokens"
        hint = "raise TrainingArguments.max_length"
        raise DatasetError(message, place=sources[0].url, hint=hint, code="dataset-too-long")
    chats = [corpus.chats[i] for i in usable]
    split = split_chats(chats, train_share=parameters.train_share, shuffle=parameters.shuffle, seed=parameters.seed)
    orders = {"train": split.train} | ({"validation": split.validation} if split.validation else {})
    packed = {
        name: pack(
            [corpus.documents[usable[i]] for i in order],
            length=length,
            packing=parameters.packing,
            pad_id=tokenizer.pad_id,
        )
        for name, order in orders.items()
    }
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "sequence_length": length,
        "pad_token_id": tokenizer.pad_id,
        "splits": {name: _split_facts(p) for name, p in packed.items()},
        "sources": [
            {"url": recorded_url(s.url), "sha256": s.sha256, "bytes": s.bytes, "rows": rows}
            for s, rows in zip(sources, corpus.rows, strict=True)
        ],
        "truncated_documents": sum(p.truncated for p in packed.values()),
        "dropped_documents": len(corpus.documents) - len(usable),
        "duplicate_documents": split.duplicates,
        "unlearned_turns": corpus.unplaced,
        "system_folded": not tokenizer.template.takes_system
        and any(m["role"] == "system" for chat in corpus.chats for m in chat.messages),
        "tokenizer": tokenizer.digest,
        "preparation": asdict(parameters),
    }
    example = corpus.documents[usable[split.train[0]]]
    report = write_report(facts, packed, [len(d.ids) for d in corpus.documents], example, tokenizer)
    tried = orders.get("validation", split.train)
    # What did not fit a row may not fit the model either.
    whole = [i for i in tried if len(corpus.documents[usable[i]].ids) <= length]
    samples = _samples([chats[i] for i in whole or tried], tokenizer)
    return facts, {
        **{f"data/{name}.safetensors": _tensors(p) for name, p in packed.items()},
        "data/dataset.json": canonical_json(facts),
        "data/samples.json": canonical_json(samples),
        "data/report.md": report.encode(),
    }


def _read(sources: Sequence[SourceFile], tokenizer: ChatTokenizer, parameters: DatasetParameters) -> _Corpus:
    columns = Columns(parameters.messages_column, parameters.context_column, parameters.response_column)
    corpus = _Corpus()
    for source in sources:
        chats = read_chats(source, columns)
        # A local file is used where it lies, and could have been written to since it was hashed.
        if sha256_of(source.path) != source.sha256:
            hint = "start again, and leave the file alone meanwhile"
            raise DatasetError("the file has changed", place=source.url, hint=hint, code="dataset-changed")
        corpus.chats.extend(chats)
        corpus.rows.append(len(chats))
        for start in range(0, len(chats), CHUNK):
            rendered = list(_render(chats[start : start + CHUNK], tokenizer, source))
            corpus.documents.extend(tokenizer.encode(rendered))
            corpus.unplaced += sum(r.unplaced for r in rendered)
    return corpus


def _render(chats: Sequence[Chat], tokenizer: ChatTokenizer, source: SourceFile) -> Iterator[Rendered]:
    for chat in chats:
        try:
            yield tokenizer.template.place(tokenizer.folded(chat))
        except UnplacedError as exc:
            place = f"{source.url}: row {chat.row}"
            hint = "mark the answers with {% generation %} in the model's chat template"
            raise DatasetError(str(exc), place=place, hint=hint, code="chat-template") from exc
        except TemplateError as exc:
            raise row_error(source.url, chat.row, f"the model's chat template refuses the chat: {exc}") from exc


def _split_facts(packed: Packed) -> dict[str, int]:
    return {
        "rows": int(packed.input_ids.shape[0]),
        "documents": packed.documents,
        "tokens": packed.tokens,
        "trained_tokens": packed.trained_tokens,
    }


def _tensors(packed: Packed) -> bytes:
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {
        "input_ids": packed.input_ids,
        "loss_mask": packed.loss_mask,
        "position_ids": packed.position_ids,
    }
    return bytes(safetensors.numpy.save(arrays))


def _samples(chats: Sequence[Chat], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """Take the first few different chats, to try a model on."""
    samples: list[dict[str, Any]] = []
    for chat in chats:
        messages = tokenizer.folded(chat).messages
        sample = {"messages": messages[:-1], "answer": messages[-1]["content"]}
        if sample not in samples:
            samples.append(sample)
        if len(samples) == SAMPLES:
            break
    return samples
