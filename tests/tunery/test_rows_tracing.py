"""Rows that are rendered without their template: the texts equal the template's, or the template renders them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, FAMILIES, SHAPES, family, source, tokenizer

from tunery.rows import pieces, sandbox
from tunery.rows.messages import Example
from tunery.rows.template import ChatTemplate
from tunery.rows.turns import trained_turns, views_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRACED = {"chatml", "smollm2", "qwen2_5", "llama3", "llama3_1", "gemma3", "phi3", "mistral_v3"}
TEMPLATES = {name: family(name) for name in FAMILIES}
CONTENTS = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        ["Yes.", " a", "a\n", "<think>\nb\n</think>", "{{ x }}", "<|im_end|>", "7:0;", "\ue000", "🗼 é", "\u2028a"]
    ),
)
ROLES = st.sampled_from([("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2])


def chat(*messages: tuple[str, str]) -> Example:
    return Example.model_validate({"messages": [{"role": role, "content": said} for role, said in messages]})


def made(text: str) -> ChatTemplate:
    return ChatTemplate(tokenizer(), {"default": text}, {"bos_token": "<s>", "eos_token": "</s>"})


def texts_of(template: ChatTemplate, example: Example) -> dict[Any, str] | None:
    return template._pieces.render(example, [message.for_template() for message in example.messages])


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_familys_texts_are_those_that_its_template_writes(name: str, data: st.DataObject) -> None:
    template = TEMPLATES[name]
    example = chat(*((role, data.draw(CONTENTS)) for role in data.draw(ROLES)))
    given_messages = [message.for_template() for message in example.messages]

    found = texts_of(template, example)

    contents = [message["content"] for message in given_messages]
    if name not in TRACED or not all(map(str.strip, contents)):
        assert found is None
    elif contents == list(map(str.strip, contents)):
        assert found is not None
    for (count, prompting), text in (found or {}).items():
        assert [text] == template._render(given_messages, None, [(count, prompting)])


@pytest.mark.parametrize("name", [*FAMILIES, *SHAPES])
def test_rows_are_encoded_as_without_tracing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATES.get(name) or made(SHAPES[name])
    rows = [
        chat(("user", said), ("assistant", f"{said}!")) for said in ("one", " two", "three ", "<|im_end|>", "s" * 99)
    ]
    ahead = [template.render_ahead(rows).encode_all(row, 50) for row in rows]
    monkeypatch.setattr(pieces.Pieces, "render", lambda *_: None)

    assert [template.render_ahead(rows).encode_all(row, 50) for row in rows] == ahead


def test_one_request_renders_all_rows_of_the_same_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    render = sandbox._render
    template = made(CHATML)
    template.render_ahead([chat(("user", "Hi"), ("assistant", "Yes"))])
    monkeypatch.setattr(
        sandbox, "_render", lambda *args, **more: (asked.append(len(args[1])), render(*args, **more))[1]
    )
    rows = [chat(("user", f"{number}?"), ("assistant", "Yes")) for number in range(50)]

    ahead = template.render_ahead(rows)
    encoded = [ahead.encode(row, 99) for row in rows]

    assert asked == []
    assert len({tuple(row.input_ids) for row in encoded}) == 50


INSPECTING = [
    "{{ content | upper }}",
    "{{ content | length }}",
    "{{ content | int(5) }}",
    "{{ content | default('x') }}",
    "{{ (content ~ ' ') | trim }}",
    "{{ ('a' + content) | trim }}",
    "{{ content | trim('a') }}",
    "{{ content.strip() }}",
    "{{ content.strip is defined }}",
    "{{ content.parts }}",
    "{{ content[0] }}",
    "{{ content[1:] }}",
    "{{ content == 'a' }}",
    "{{ 'a' != content }}",
    "{{ 'a' in content }}",
    "{{ content in 'abc' }}",
    "{{ content in ['a', 'b'] }}",
    "{{ content < 'b' }}",
    "{{ content is eq('a') }}",
    "{{ content is lower }}",
    "{{ content is in('abc') }}",
    "{{ {'a': 1}[content] }}",
    "{{ {'a': 1}.get(content) }}",
    "{{ {content: 1} }}",
    "{{ '%s' % content }}",
    "{{ '%s' | format(content) }}",
    "{{ '{}'.format(content) }}",
    "{{ [content] | join(',') }}",
    "{{ [content] }}",
    "{{ [content] | string }}",
    "{{ [content] | map('length') | list }}",
    "{{ [content] | map('int') | list }}",
    "{{ [content] | select('equalto', 'a') | list | length }}",
    "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}",
    "{{ messages | map(attribute='content') | map('upper') | join }}",
    "{{ messages | tojson }}",
    "{{ content * 2 }}",
    "{{ content + ['a'] }}",
    "{{ 'abc'.startswith(content) }}",
    "{{ 'abc'.replace('b', content) }}",
    "{% for letter in content %}{{ letter }}{% endfor %}",
    "{% for word in messages %}{{ loop.changed(word.content) }}{% endfor %}",
    "{% set kept %}{{ content }}{% endset %}{{ kept | upper }}",
    "{% macro say(x) %}{{ x }}{% endmacro %}{{ say(content) | upper }}",
    "{% filter upper %}{{ content }}{% endfilter %}",
    "{% autoescape true %}{{ content }}{% endautoescape %}",
    "{% for m in messages recursive %}{{ m.content if loop.depth0 else loop(messages) | upper }}{% endfor %}",
    "{{ range(content) }}",
    "{{ dict(a=content) }}",
    "{{ dict(a=content).a | upper }}",
    "{{ namespace(a=content).a | upper }}",
    "{{ raise_exception(content) }}",
    "{{ strftime_now('%H:%M:%S') }}{{ content }}",
]
"""Templates in which the text around a content depends on that content, or on the time."""


@pytest.mark.parametrize("text", INSPECTING)
def test_a_template_that_reads_a_content_renders_every_row(text: str) -> None:
    answer = "{{ messages[0].content }}{{ eos_token }}"
    environment = sandbox.Environment()
    begin = "{% set content = messages[-1].content %}"
    writing, template = environment.from_string(begin + answer), environment.from_string(begin + text + answer)
    messages = [{"role": "user", "content": (0, True)}, {"role": "assistant", "content": (1, True)}]

    assert environment.trace(writing, [{"messages": messages}], NOW) == [[0]]
    assert environment.trace(template, [{"messages": messages}], NOW) is None


WRITING: list[tuple[str, list[str | int]]] = [
    ("{{ content }}", [0]),
    ("<{{ content }}{{ content }}>", ["<", 0, 0, ">"]),
    ("{{ 'a' + content + 'b' ~ 5 ~ content }}", ["a", 0, "b5", 0]),
    ("{{ content | trim }}", [0]),
    ("{% if content %}{{ content }}{% else %}{{ content | upper }}{% endif %}", [0]),
    ("{{ content or 'nothing' }}{{ not content }}", [0, "False"]),
    ("{{ content is string }}{{ content is none }}{{ content is mapping }}", ["TrueFalseFalse"]),
    ("{{ content is defined and content is not none }}{{ content is iterable }}", ["TrueTrue"]),
    ("{% set ns = namespace(a=content) %}{{ ns.a }}", [0]),
    ("{{ messages[0]['content'] }}{{ messages | length }}", [0, "1"]),
    ("{{ message.get('content') }}{{ message.name }}", [0]),
    ("no content", ["no content"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "wanted"), WRITING)
def test_a_template_that_writes_contents_is_traced(text: str, wanted: list[str | int]) -> None:
    environment = sandbox.Environment()
    begin = "{% set message = messages[0] %}{% set content = message.content %}"
    template = environment.from_string(begin + text)

    traced = environment.trace(template, [{"messages": [{"role": "user", "content": (0, True)}]}], NOW)

    assert traced is not None
    assert [list(_joined(traced[0]))] == [wanted]


def test_trimming_is_traced_only_without_blanks_around_a_content() -> None:
    only_users = "{% if message.role == 'user' %}{{ message.content | trim }}{% else %}{{ message.content }}{% endif %}"
    template = made("{% for message in messages %}" + only_users + "{{ eos_token }}{% endfor %}")

    assert texts_of(template, chat(("user", "a"), ("assistant", "b"))) is not None
    assert texts_of(template, chat(("user", "a"), ("assistant", " b"))) is not None
    assert texts_of(template, chat(("user", "a "), ("assistant", "b"))) is None


def test_what_is_not_plain_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    template = made(CHATML)
    plain = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tool = {"type": "function", "function": {"name": "look"}}
    named = {"messages": [{"role": "user", "content": "a", "name": "x"}, plain["messages"][1]]}
    monkeypatch.setattr(pieces, "_MOST_CHARACTERS", 50)
    for row, is_filled in (
        (plain, True),
        ({**plain, "tools": [tool]}, False),
        (named, False),
        ({"messages": [{"role": "user", "content": ""}, plain["messages"][1]]}, False),
        ({"messages": [{"role": "user", "content": "a" * 51}, plain["messages"][1]]}, False),
    ):
        assert (texts_of(template, Example.model_validate(row)) is not None) == is_filled


def test_a_template_that_multiplies_a_content_is_left_to_the_limits_of_a_rendering() -> None:
    message = "{% for x in range(9) %}{{ message.content }}{% endfor %}{{ eos_token }}"
    often = "{% for message in messages %}" + message + "{% endfor %}"

    assert texts_of(made(often), chat(("user", "a"), ("assistant", "b"))) is None
    assert texts_of(made(often.replace("9", "8")), chat(("user", "a"), ("assistant", "b"))) is not None


def test_a_template_that_is_never_traced_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    template = made(source("qwen3"))
    tried: list[int] = []
    trace = template._pieces._trace
    monkeypatch.setattr(template._pieces, "_trace", lambda *args: (tried.append(1), trace(*args))[1])

    for turns in range(1, 21):
        assert texts_of(template, chat(*[("user", "a"), ("assistant", "b")] * turns)) is None

    assert len(tried) == pieces._MOST_FAILURES


def test_a_conversation_that_the_template_would_shorten_is_not_traced() -> None:
    first_only = "{{ messages[0].content }}{{ messages[-1].content }}{{ eos_token }}"

    assert texts_of(made(first_only), chat(("user", "a"), ("assistant", "b"))) is not None
    assert texts_of(made(first_only), chat(("user", "a"), ("user", "c"), ("assistant", "b"))) is None


def test_views_are_those_that_an_encoding_reads() -> None:
    example = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    found = texts_of(made(CHATML), example)

    assert found is not None
    assert tuple(found) == views_of(trained_turns(example), 4)


def _joined(found: list[str | int]) -> Iterator[str | int]:
    """Joins adjacent texts."""
    text = ""
    for piece in found:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        yield piece
        text = ""
    if text:
        yield text
