"""Chat templates: a chat as the text that the model knows, and where in that text its answers stand.

A model folder's template is rendered as transformers renders it (`apply_chat_template`): Jinja in a sandbox in which
nothing can be changed, with `raise_exception`, `tojson` and loop controls. One thing is different: there is no
`strftime_now`, because text that depends on the day cannot be made again. Templates that ask for today's date carry a
fixed one for this case (Llama 3.1 and later do).

What is learned of a chat. Call R(n) the first n messages rendered, and G(n) the same with the prompt for the model to
answer. An answer at index i is learned from the end of G(i), which is what the model will have seen when it is asked,
to the end of R(i+1). That holds only where the whole chat's text begins with G(i): some templates write the past anew
(they drop earlier thoughts, or move the system message). Such turns are not learned, and are counted; a template that
marks its answers with {% generation %} says itself where they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kaito_flows.dataset.formats import Chat, Message
from kaito_flows.errors import DatasetError

# Private-use characters around what a {% generation %} block wrote; taken out again before anyone sees the text.
_OPEN, _CLOSE = "\uf8d0\uf8d1", "\uf8d1\uf8d0"
_MARK = re.compile(f"({_OPEN}|{_CLOSE})")


@dataclass(frozen=True, slots=True)
class Answer:
    """Where one learned answer stands in the rendered text, in characters.

    `start` to `end` is the whole turn, its end token included; `content_end` is where the answer's own words end.
    `closed` says that the turn's end is certain: the template wrote nothing after it that belongs to the end of a chat.
    """

    start: int
    content_end: int
    end: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text, the answers to learn in it, and how many of its answers could not be placed."""

    text: str
    answers: tuple[Answer, ...]
    unplaced: int


class TemplateError(Exception):
    """The template cannot render this chat; the message is the template's own."""


class UnplacedError(TemplateError):
    """The template renders a chat, but none of its answers is where the template would ask for it."""


class ChatTemplate:
    """A model's chat template.

    Args:
        source: the Jinja source.
        special_tokens: what the template knows by name (`bos_token`, `eos_token`).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)
        self._marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Return the text, as transformers' `apply_chat_template(…, tokenize=False)` does.

        Raises:
            TemplateError: the template refuses these messages.
        """
        text = self._render(messages, generation_prompt)
        return _MARK.sub("", text) if self._marks else text

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as exc:
            raise TemplateError(str(exc)) from exc
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as exc:
            raise TemplateError(f"{type(exc).__name__}: {exc}") from exc

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message gets into the text; else `fold_system` is needed."""
        try:
            shown = self.render([{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}])
        except TemplateError:
            return False
        return "SYSTEM" in shown

    def place(self, chat: Chat) -> Rendered:
        """Render a chat and find its answers.

        Raises:
            TemplateError: the template refuses the chat.
            UnplacedError: no answer of it can be placed.
        """
        messages = chat.messages
        text = self.render(messages)
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= chat.learn_from]
        found = [answer for i in asked if (answer := self._answer(messages, i, text)) is not None]
        if len(found) < len(asked) and self._marks:
            marked = self._marked(messages, len(asked))
            found = marked if len(marked) > len(found) else found
        if not found:
            raise UnplacedError("the chat template writes an answer differently from how it asks for one")
        return Rendered(text, tuple(found), len(asked) - len(found))

    def _answer(self, messages: Sequence[Message], index: int, text: str) -> Answer | None:
        try:
            prompt = self.render(messages[:index], generation_prompt=True)
            turn = text if index + 1 == len(messages) else self.render(messages[: index + 1])
        except TemplateError:
            return None
        # At the end of a chat some templates write more than at the end of a turn (Phi-3: the end-of-text token).
        end = len(turn) if text.startswith(turn) else _shared(turn, text)
        start = len(prompt)
        if end < start or not text.startswith(prompt):
            return None
        closed = end == len(turn)
        content = messages[index]["content"].strip()
        at = text.find(content, start, end)
        if at < 0 and not closed:
            return None
        return Answer(start, at + len(content) if at >= 0 else start, end, closed)

    def _marked(self, messages: Sequence[Message], wanted: int) -> list[Answer]:
        """Return the last `wanted` blocks that the template itself marks as generated."""
        answers: list[Answer] = []
        start = position = 0
        for piece in _MARK.split(self._render(messages, False)):
            if piece == _OPEN:
                start = position
            elif piece == _CLOSE:
                answers.append(Answer(start, position, position, closed=False))
            else:
                position += len(piece)
        return answers[-wanted:]


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def fold_system(chat: Chat) -> Chat:
    """Return the chat with each system message put before the text of the user message that follows it.

    For models whose template knows no system role (Gemma, early Mistral): their makers advise just this. Without a
    user message after it, a system message becomes one.
    """
    folded: list[Message] = []
    waiting: list[str] = []
    learn_from = 0
    for index, message in enumerate(chat.messages):
        if index == chat.learn_from:
            learn_from = len(folded)
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if waiting and message["role"] == "user":
            message = {"role": "user", "content": "\n\n".join([*waiting, message["content"]])}
        elif waiting:
            folded.append({"role": "user", "content": "\n\n".join(waiting)})
        waiting = []
        folded.append(message)
    return Chat(folded, learn_from, chat.row)


def load_template(folder: Path) -> ChatTemplate:
    """Return the chat template of a model folder: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    Raises:
        DatasetError: (`no-chat-template`) it has none; (`chat-template`) it is not valid Jinja.
    """
    config = read_json(folder / "tokenizer_config.json")
    source = _source(folder, config)
    if source is None:
        raise DatasetError(
            "the model has no chat template, so chats cannot be written as it knows them",
            place=str(folder),
            hint="use an instruct model, or put a chat_template.jinja in its folder",
            code="no-chat-template",
        )
    try:
        return ChatTemplate(source, special_tokens(folder))
    except jinja2.TemplateError as exc:
        raise DatasetError(f"the chat template is not valid: {exc}", place=str(folder), code="chat-template") from exc


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    written = config.get("chat_template")
    if isinstance(written, list):
        named = {item["name"]: item["template"] for item in written}
        # Several templates by name: "default" is the one for plain chats.
        return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return written if isinstance(written, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """Return a model folder's special tokens by name (`bos_token`: `<s>`), those that are set."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    found = {}
    for name in names:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder; nothing where there is no file.

    Raises:
        DatasetError: (`tokenizer-damaged`) it is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as exc:
        raise DatasetError("not JSON", place=str(path), hint="get the model again", code="tokenizer-damaged") from exc
    if not isinstance(value, dict):
        raise DatasetError("not a JSON object", place=str(path), hint="get the model again", code="tokenizer-damaged")
    return value


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} … {% endgeneration %}, with which a template marks what the model says."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter, which writes < and > for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
