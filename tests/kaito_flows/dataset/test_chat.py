from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kaito_flows.dataset.chat import ChatTemplate, TemplateError, UnplacedError, fold_system, load_template
from kaito_flows.dataset.formats import Chat
from kaito_flows.errors import DatasetError

NAMES = ["chatml", "phi3", "llama3", "llama2", "gemma", "mistral3", "plain"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def learned(template: str, messages: list[dict[str, str]], learn_from: int = 0) -> list[str]:
    rendered = ChatTemplate(template, TOKENS).place(Chat(messages, learn_from, 1))
    return [rendered.text[answer.start : answer.end] for answer in rendered.answers]


@pytest.mark.parametrize("name", NAMES)
def test_templates_render_as_transformers_renders_them(
    name: str, templates: dict[str, str], bpe: Tokenizer, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    class NoDate(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if key != "strftime_now":
                super().__setitem__(key, value)

    # Theirs knows the date of today, ours does not.
    compile_template = chat_template_utils._compile_jinja_template.__wrapped__

    def without_date(source: str) -> Any:
        template = compile_template(source)
        template.environment.globals.pop("strftime_now", None)
        template.globals.pop("strftime_now", None)
        return template

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", without_date)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **TOKENS)
    ours = ChatTemplate(templates[name], TOKENS)
    chats = [
        say("Hi"),
        say("Hi", " Hello \n"),
        say("Hi", "Hello", "<b>&\"'é漢😀", "{{ no }} {% jinja %}"),
        say("Hi", "Hello", system="Be brief."),
    ]
    for messages in chats if ours.takes_system else chats[:3]:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                messages, chat_template=templates[name], tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render(messages, generation_prompt=prompt) == expected


def test_tojson_is_json_and_not_html() -> None:
    template = ChatTemplate("{{ messages | tojson }}{{ messages[0] | tojson(indent=1) }}", {})
    assert template.render([{"role": "user", "content": "<é>"}]) == (
        '[{"role": "user", "content": "<é>"}]{\n "role": "user",\n "content": "<é>"\n}'
    )


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("chatml", ["One<|im_end|>\n", "Two<|im_end|>\n"]),
        ("phi3", ["One<|end|>\n<", "Two<|end|>\n</s>"]),
        ("llama3", ["One<|eot_id|>", "Two<|eot_id|>"]),
        ("llama2", [" One </s>", " Two </s>"]),
        ("gemma", ["One<end_of_turn>\n", "Two<end_of_turn>\n"]),
        ("mistral3", [" One</s>", " Two</s>"]),
        ("plain", ["One\n", "Two\n"]),
    ],
)
def test_each_answer_of_a_chat_is_found(name: str, answers: list[str], templates: dict[str, str], say: Any) -> None:
    assert learned(templates[name], say("One", "One", "user", "Two")) == answers
    assert learned(templates[name], say("One", "One", "user", "Two"), learn_from=2) == answers[1:]


def test_an_answer_that_repeats_the_question_is_found_in_its_own_turn(templates: dict[str, str], say: Any) -> None:
    messages = say("yes", "yes", "yes", "yes")
    rendered = ChatTemplate(templates["chatml"], TOKENS).place(Chat(messages, 0, 1))
    assert [rendered.text[: answer.start].count("yes") for answer in rendered.answers] == [1, 3]


def test_a_past_that_is_written_anew_is_not_learned_and_counted(templates: dict[str, str], say: Any) -> None:
    messages = say("a", "One", "b", "Two", system="Be brief.")
    rendered = ChatTemplate(templates["mistral3"], TOKENS).place(Chat(messages, 0, 1))
    assert [rendered.text[a.start : a.end] for a in rendered.answers] == [" Two</s>"]
    assert rendered.unplaced == 1


TAGGED = """{% for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
    {{- '<think></think>' if loop.last }}
    {%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def test_generation_tags_say_where_answers_are_that_cannot_be_placed(say: Any) -> None:
    messages = say("a", "One", "b", "Two")
    untagged = TAGGED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert learned(untagged, messages) == ["<think></think>Two<|im_end|>\n"]
    assert learned(TAGGED, messages) == ["One<|im_end|>", "Two<|im_end|>"]
    assert ChatTemplate(TAGGED, TOKENS).render(messages) == ChatTemplate(untagged, TOKENS).render(messages)


def test_a_template_that_answers_otherwise_than_it_asks_is_refused(say: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ '???' if add_generation_prompt }}"
    with pytest.raises(UnplacedError):
        learned(template, say("a", "b"))


def test_an_answer_that_the_template_rewrites_is_learned_as_it_writes_it(say: Any) -> None:
    upper = "{% for m in messages %}{{ m.role }}:{{ m.content | upper }};{% endfor %}"
    assert learned(upper, say("a", "b", "c", "d")) == ["assistant:B;", "assistant:D;"]


def test_a_chat_that_begins_with_an_answer_teaches_what_follows_a_question(templates: dict[str, str]) -> None:
    messages = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "a"}]
    messages.append({"role": "assistant", "content": "b"})
    needs_first = "{{ messages[0].content[:0] }}" + templates["chatml"]
    rendered = ChatTemplate(needs_first, TOKENS).place(Chat(messages, 0, 1))
    assert [rendered.text[a.start : a.end] for a in rendered.answers][-1] == "b<|im_end|>\n"


def test_a_template_is_told_from_the_messages_it_refuses(templates: dict[str, str], say: Any) -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate(templates["llama2"], TOKENS).render(say("a") + say("b"))
    for source in ("{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ strftime_now('%Y') }}"):
        with pytest.raises(TemplateError):
            ChatTemplate(source, {}).render(say("a"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ range(10000000) | list }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str, say: Any) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(say("a"))


def test_system_messages_are_folded_where_the_template_has_no_such_role(templates: dict[str, str], say: Any) -> None:
    ignores = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    takes = {name: ChatTemplate(source, TOKENS).takes_system for name, source in templates.items()}
    assert takes == {**dict.fromkeys(NAMES, True), "gemma": False}
    assert not ChatTemplate(ignores, {}).takes_system
    folded = fold_system(Chat(say("a", "b", "c", "d", system="Be brief."), 3, 7))
    assert folded == Chat(say("Be brief.\n\na", "b", "c", "d"), 2, 7)
    alone = [{"role": "system", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
    assert fold_system(Chat(alone, 1, 1)).messages == say("Say hi.", "hi")


def test_the_template_is_found_wherever_model_folders_keep_it(model_folder: Any) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert load_template(model_folder("F", name="a", chat_template="C")).source == "F"
    assert load_template(model_folder(None, name="b", chat_template="C")).source == "C"
    assert load_template(model_folder(None, name="c", chat_template=named)).source == "D"
    assert load_template(model_folder(None, name="d", chat_template=named[:1])).source == "T"


def test_special_tokens_may_be_objects_or_lie_beside(model_folder: Any) -> None:
    folder = model_folder(
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}", eos_token={"content": "</s>"}, bos_token=None
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}}))
    assert load_template(folder).render([]) == "</s><unk>"


@pytest.mark.parametrize(
    ("template", "code"), [(None, "no-chat-template"), ("{% for %}", "chat-template"), ("{% if %}{{", "chat-template")]
)
def test_a_folder_without_a_usable_template_is_named(template: str | None, code: str, model_folder: Any) -> None:
    folder: Path = model_folder(template)
    with pytest.raises(DatasetError) as caught:
        load_template(folder)
    assert (caught.value.code, caught.value.place) == (code, str(folder))
