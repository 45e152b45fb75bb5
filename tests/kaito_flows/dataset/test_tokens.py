from __future__ import annotations

import json
from typing import Any

import pytest

from kaito_flows.dataset.formats import Chat
from kaito_flows.dataset.tokens import ChatTokenizer, Document
from kaito_flows.errors import DatasetError


def encode(tokenizer: ChatTokenizer, messages: list[dict[str, str]], learn_from: int = 0) -> Document:
    chat = tokenizer.folded(Chat(messages, learn_from, 1))
    (document,) = tokenizer.encode([tokenizer.template.place(chat)])
    return document


def shown(tokenizer: ChatTokenizer, document: Document) -> str:
    """The tokens, one after the other, learned ones in brackets."""
    pieces = [tokenizer.tokenizer.decode([i], skip_special_tokens=False) for i in document.ids.tolist()]
    marked = [f"[{p}]" if on else p for p, on in zip(pieces, document.learned.tolist(), strict=True)]
    return "".join(marked)


def test_token_by_token_the_answer_and_its_end_are_learned_and_nothing_else(model_folder: Any, say: Any) -> None:
    tokenizer = ChatTokenizer(model_folder())
    document = encode(tokenizer, say("What is it?", "a tower with light", system="yes"))
    assert shown(tokenizer, document) == (
        "<|im_start|>system\nyes<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        "[a][ tower][ with][ light][<|im_end|>]\n"
    )


@pytest.mark.parametrize(
    ("name", "eos", "stop", "tail"),
    [
        ("chatml", "<|im_end|>", None, "[yes][<|im_end|>]\n"),
        # The end-of-turn token of a model whose end-of-text token is another one.
        ("chatml", "<|endoftext|>", None, "[yes][<|im_end|>]\n"),
        ("phi3", "<|endoftext|>", ["<|endoftext|>", "<|end|>"], "[yes][<|end|>]\n<|endoftext|>"),
        ("phi3", "<|endoftext|>", "<|endoftext|>", "[yes][<|end|>][\n][<|endoftext|>]"),
        ("llama3", "<|eot_id|>", None, "[yes][<|eot_id|>]"),
        ("llama2", "</s>", None, "[ yes][ ][</s>]"),
        ("gemma", "</s>", None, "[yes][<end_of_turn>]\n"),
        ("mistral3", "</s>", None, "[ yes][</s>]"),
        # Nothing ends the turn: the end-of-text token is put there.
        ("plain", "</s>", None, "[ yes][\n][</s>]"),
    ],
)
def test_every_family_is_taught_to_stop(
    name: str, eos: str, stop: Any, tail: str, model_folder: Any, templates: dict[str, str], say: Any, bpe: Any
) -> None:
    ids = [bpe.token_to_id(t) for t in stop] if isinstance(stop, list) else stop and bpe.token_to_id(stop)
    tokenizer = ChatTokenizer(model_folder(templates[name], eos_token=eos, stop=ids))
    text = shown(tokenizer, encode(tokenizer, say("What is it?", "yes")))
    assert text.endswith(tail)
    assert "[" not in text.removesuffix(tail).replace("[INST]", "").replace("[/INST]", "")


def test_earlier_answers_of_phi3_end_with_their_turn(
    model_folder: Any, templates: dict[str, str], say: Any, bpe: Any
) -> None:
    end = bpe.token_to_id("<|end|>")
    tokenizer = ChatTokenizer(model_folder(templates["phi3"], eos_token="<|endoftext|>", stop=[end]))
    assert shown(tokenizer, encode(tokenizer, say("a", "yes", "with", "no"))) == (
        "<|user|>\na<|end|>\n<|assistant|>\n[yes][<|end|>]\n<|user|>\nwith<|end|>\n"
        "<|assistant|>\n[no][<|end|>]\n<|endoftext|>"
    )


def test_only_the_completion_of_a_chat_with_a_past_is_learned(model_folder: Any, say: Any) -> None:
    tokenizer = ChatTokenizer(model_folder())
    text = shown(tokenizer, encode(tokenizer, say("a", "yes", "with", "no"), learn_from=2))
    assert "assistant\nyes<|im_end|>" in text
    assert text.endswith("[no][<|im_end|>]\n")


def test_characters_of_many_bytes_are_learned_whole(model_folder: Any, say: Any) -> None:
    tokenizer = ChatTokenizer(model_folder())
    document = encode(tokenizer, say("é漢😀", "漢é😀é"))
    learned = tokenizer.tokenizer.decode(
        [i for i, on in zip(document.ids.tolist(), document.learned.tolist(), strict=True) if on],
        skip_special_tokens=False,
    )
    assert learned == "漢é😀é<|im_end|>"
    assert tokenizer.tokenizer.decode(document.ids.tolist(), skip_special_tokens=False).count("漢") == 2


def test_a_token_across_the_border_is_learned_if_only_whitespace_of_it_is_the_prompts(
    model_folder: Any, templates: dict[str, str], say: Any
) -> None:
    tokenizer = ChatTokenizer(model_folder(templates["plain"], eos_token="</s>"))
    assert "Assistant:[ tower]" in shown(tokenizer, encode(tokenizer, say("What", "tower with")))


def test_text_is_tokenised_as_transformers_tokenises_it(model_folder: Any, templates: dict[str, str], say: Any) -> None:
    transformers = pytest.importorskip("transformers")
    messages = say("Hello, what is it?", "a  tower\n\n with é😀", "no", "thanks")
    for name in ("chatml", "llama3", "llama2"):
        folder = model_folder(templates[name].replace("strftime_now", "nothing"), name=name)
        tokenizer = ChatTokenizer(folder)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        theirs.backend_tokenizer.no_truncation()
        theirs.backend_tokenizer.no_padding()
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert encode(tokenizer, messages).ids.tolist() == expected


def test_the_digest_covers_what_makes_the_tokens_and_not_the_folder(model_folder: Any) -> None:
    one = ChatTokenizer(model_folder(name="one", model_max_length=1))
    same = ChatTokenizer(model_folder(name="same", model_max_length=2))
    others = [
        ChatTokenizer(model_folder("{{ messages }}", name="template")),
        ChatTokenizer(model_folder(name="eos", eos_token="</s>")),
        ChatTokenizer(model_folder(name="stop", stop=[1])),
        ChatTokenizer(model_folder(name="pad"), pad_token="</s>"),
    ]
    assert one.digest == same.digest
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_padding_is_the_pad_token_or_else_the_end_of_text(model_folder: Any, bpe: Any) -> None:
    assert ChatTokenizer(model_folder(name="a", pad_token="<|endoftext|>")).pad_id == bpe.token_to_id("<|endoftext|>")
    assert ChatTokenizer(model_folder(name="b")).pad_id == bpe.token_to_id("<|im_end|>")
    assert ChatTokenizer(model_folder(name="c"), pad_token="</s>").pad_id == bpe.token_to_id("</s>")
    assert ChatTokenizer(model_folder(name="d", eos_token=None)).pad_id == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "no-tokenizer"),
        ("{", "tokenizer-damaged"),
        ("[]", "tokenizer-damaged"),
        ('{"model": {"type": "Nothing"}}', "tokenizer-damaged"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(text: str | None, code: str, model_folder: Any) -> None:
    folder = model_folder()
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DatasetError) as caught:
        ChatTokenizer(folder)
    assert caught.value.code == code
    assert str(folder) in caught.value.place


def test_an_unknown_end_token_in_the_config_is_no_obstacle(model_folder: Any, say: Any) -> None:
    folder = model_folder(eos_token="<nowhere>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": None}))
    tokenizer = ChatTokenizer(folder)
    assert shown(tokenizer, encode(tokenizer, say("a", "yes"))).endswith("[yes][<|im_end|>]\n")
