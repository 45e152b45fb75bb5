"""A real HTTP server that can be made to misbehave, small real tokenizers, and files of chats."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kaito_flows.dataset import SourceFile

CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# The formats of well-known model families, each with what makes it hard.
TEMPLATES = {
    "chatml": CHATML,
    # Ends a chat, but not a turn, with the end-of-text token.
    "phi3": """{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}""",
    # Trims, and has a date.
    "llama3": """{{- bos_token }}
{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- set first = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date + "\\n\\n" + first + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if loop.first and first %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    # Has no prompt for the model to answer; the system message stands in the first user message.
    "llama2": """{% if messages[0].role == 'system' %}
    {% set system, turns = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}
{% else %}
    {% set system, turns = '', messages %}
{% endif %}
{% for m in turns %}
    {% if (m.role == 'user') != loop.index0 is even %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    # Knows no system role.
    "gemma": """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}""",
    # Writes the past anew: the system message moves to the last user message.
    "mistral3": """{{ bos_token }}{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set lead = messages[0].content + '\\n\\n' if m == last and messages[0].role == 'system' else '' %}
        {{- '[INST] ' + lead + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}""",
    # Has no special tokens at all.
    "plain": """{% for m in messages %}
{{ m.role | capitalize }}: {{ m.content }}
{% endfor %}
{% if add_generation_prompt %}Assistant: {% endif %}""",
}
SPECIAL = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
WORDS = (
    "a tower with a light that gives warning of ships. Define the word lighthouse! What is it? Hello, yes, no, thanks."
)


@dataclass
class Fault:
    """What the server does instead of answering well, once."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    body: bytes = b""


@dataclass
class Page:
    """What lies under a path; `etag`, `modified`, `ranges`, `head` say what the server offers for it."""

    body: bytes
    content_type: str = "application/octet-stream"
    etag: str | None = None
    modified: str | None = None
    ranges: bool = True
    head: bool = True
    faults: list[Fault] = field(default_factory=list)


@dataclass
class Seen:
    """A request that came in, and how many bytes of a body went out."""

    method: str
    path: str
    headers: Message
    status: int = 0
    sent: int = 0


class Site:
    """The server: pages by path (query included), and the requests that it has seen."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.seen: list[Seen] = []
        self.url = ""

    def add(self, path: str, body: bytes, **options: Any) -> str:
        options.setdefault("etag", f'"{hashlib.md5(body).hexdigest()}"')
        self.pages[path] = Page(body, **options)
        return self.url + path

    def answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        seen = Seen(method, handler.path, handler.headers)
        self.seen.append(seen)
        page = self.pages.get(handler.path)
        if page is None or (method == "HEAD" and not page.head):
            seen.status = 404 if page is None else 403
            handler.send_error(seen.status)
            return
        fault = page.faults.pop(0) if page.faults else Fault()
        status, body, headers = self._plain(page, handler.headers) if fault.status == 200 else (fault.status, b"", {})
        body = body if fault.status == 200 else fault.body
        seen.status = status
        handler.send_response(status)
        for name, value in {**headers, **fault.headers}.items():
            handler.send_header(name, value)
        if status != 304:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if method == "HEAD":
            return
        out = body if fault.cut_after is None else body[: fault.cut_after]
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(out)
            handler.wfile.flush()
            seen.sent = len(out)
        handler.close_connection = handler.close_connection or len(out) < len(body)

    def _plain(self, page: Page, asked: Message) -> tuple[int, bytes, dict[str, str]]:
        headers = {"Content-Type": page.content_type}
        headers |= {"ETag": page.etag} if page.etag else {}
        headers |= {"Last-Modified": page.modified} if page.modified else {}
        if page.etag and asked.get("If-None-Match") == page.etag:
            return 304, b"", headers
        if page.modified and not page.etag and asked.get("If-Modified-Since") == page.modified:
            return 304, b"", headers
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.get("Range", ""))
        same = asked.get("If-Range") in (None, page.etag, page.modified)
        if not (span and page.ranges and same):
            return 200, page.body, headers
        first = int(span[1])
        if first >= len(page.body):
            return 416, b"", {"Content-Range": f"bytes */{len(page.body)}"}
        body = page.body[first : int(span[2]) + 1 if span[2] else None]
        headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(page.body)}"
        return 206, body, headers


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            made.answer(self, "GET")

        def do_HEAD(self) -> None:
            made.answer(self, "HEAD")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fault() -> type[Fault]:
    return Fault


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """A small byte-level BPE with the special tokens of several model families."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # What a folder may hold and must not matter here: trimmed offsets, added tokens, truncation, padding.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=300)
    return tokenizer


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


ModelFolder = Callable[..., Path]


@pytest.fixture
def model_folder(tmp_path: Path, bpe: Tokenizer) -> ModelFolder:
    """Makes a model folder with the BPE, a chat template and an end-of-text token."""

    def make(template: str | None = CHATML, *, name: str = "model", stop: Any = None, **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        bpe.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "<|im_end|>", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if stop is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
        return folder

    return make


SourceMaker = Callable[..., SourceFile]


@pytest.fixture
def source(tmp_path: Path) -> SourceMaker:
    """Makes a source file: of bytes as they are, or of columns as parquet."""

    def make(content: bytes | dict[str, Any], name: str = "data.bin") -> SourceFile:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(pa.table(content), path)
        raw = path.read_bytes()
        return SourceFile(path.as_uri(), path, hashlib.sha256(raw).hexdigest(), len(raw))

    return make


ChatMaker = Callable[..., list[dict[str, str]]]


@pytest.fixture
def say() -> ChatMaker:
    """Makes messages out of texts: user, assistant, user, …; `system` goes before them."""

    def make(*texts: str, system: str | None = None) -> list[dict[str, str]]:
        head = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    return make
