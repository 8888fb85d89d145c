"""Every accepted field appears in the text: a template that shows all fields but one refuses rows with that one."""

import json
from pathlib import Path
from typing import Any

import pytest
from templates import CHATML, LLAMA_LIKE, QWEN3_LIKE, tokenizer

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import encode_example, read_examples
from tunery.rows.errors import CannotRender
from tunery.rows.messages import Example, Message, Tool
from tunery.rows.template import ChatTemplate

DATA = Path(__file__).parents[1] / "data"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\nBODY<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    + TURNS.replace(
        "BODY",
        "{{ m.name or '' }}{{ m.refusal or '' }}{{ m.reasoning_content or '' }}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    )
    + ASKS
)
"""A template that shows every field."""

USER = {"role": "user", "content": "q"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é", "n": 2, "on": true}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "found"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "Where"}}},
    },
}
ANSWER = {"role": "assistant", "content": "a"}


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer(), {"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})


def row(*messages: dict[str, Any], **fields: Any) -> Example:
    return Example.model_validate({"messages": list(messages), **fields})


def without(part: str, instead: str = "") -> str:
    assert part in ALL
    return ALL.replace(part, instead)


def of_each_tool(body: str) -> str:
    return without("{{ tools | tojson }}", "{% for t in tools | map(attribute='function') %}" + body + "{% endfor %}")


CASES: dict[str, tuple[str, Example, str]] = {
    "tools": (without("{{ tools | tojson }}"), row(USER, ANSWER, tools=[TOOL]), "tools, so 'tools[0].function.name'"),
    "tool description": (
        without(
            "{{ tools | tojson }}", "{% for t in tools %}{{ t.function.name }}{{ t.function.parameters }}{% endfor %}"
        ),
        row(USER, ANSWER, tools=[TOOL]),
        "tools, so 'tools[0].function.description'",
    ),
    "tool parameters": (
        without(
            "{{ tools | tojson }}", "{% for t in tools %}{{ t.function.name }}{{ t.function.description }}{% endfor %}"
        ),
        row(USER, ANSWER, tools=[TOOL]),
        "tools, so 'tools[0].function.parameters'",
    ),
    "call": (
        without("{{ c.function | tojson }}"),
        row(USER, CALL),
        "tool calls, so 'tool_calls[0].function.name' of message 2",
    ),
    "arguments": (
        without("{{ c.function | tojson }}", "{{ c.function.name }}"),
        row(USER, CALL),
        "tool calls, so 'tool_calls[0].function.arguments' of message 2",
    ),
    "argument values": (
        without("{{ c.function | tojson }}", "{{ c.function.name }}{{ c.function.arguments | list }}"),
        row(USER, CALL),
        "tool calls, so 'tool_calls[0].function.arguments' of message 2",
    ),
    "second call": (
        without("{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}"),
        row(USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}),
        "tool calls, so 'tool_calls[1].function.name' of message 2",
    ),
    "tool result": (
        without("{{ m.content or '' }}", "{% if m.role != 'tool' %}{{ m.content or '' }}{% endif %}"),
        row(USER, CALL, RESULT, ANSWER),
        "tool results, so 'content' of message 3",
    ),
    "content beside a call": (
        without("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content or '' }}{% endif %}"),
        row(USER, {**CALL, "content": "One moment."}),
        "content beside tool calls, so 'content' of message 2",
    ),
    "system in the middle": (
        without("{{ m.content or '' }}", "{% if m.role != 'system' or loop.first %}{{ m.content or '' }}{% endif %}"),
        row({"role": "system", "content": "s"}, USER, {"role": "developer", "content": "t"}, ANSWER),
        "a system message there, so 'content' of message 3",
    ),
    "name": (
        without("{{ m.name or '' }}"),
        row({**USER, "name": "Ann"}, ANSWER),
        "names, so 'name' of message 1",
    ),
    "refusal": (
        without("{{ m.refusal or '' }}"),
        row(USER, {**ANSWER, "refusal": "No."}),
        "a refusal beside content, so 'refusal' of message 2",
    ),
    "thinking": (
        without("{{ m.reasoning_content or '' }}"),
        row(USER, {**ANSWER, "reasoning_content": "hm"}),
        "thinking, so 'reasoning_content' of message 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_field_that_the_template_does_not_show_is_refused(case: str) -> None:
    source, example, lost = CASES[case]

    template_of(ALL).encode_all(example, 10_000)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(CannotRender) as caught:
            template_of(source).encode_all(example, 10_000)
        assert f"does not render {lost} would be lost. " in caught.value.message


@pytest.mark.parametrize("case", CASES)
def test_chat_refuses_what_training_refuses(case: str) -> None:
    source, example, lost = CASES[case]
    asked = [*example.messages, Message(role="user", content="And now?")]

    template_of(ALL).encode_prompt(asked, example.tools)
    with pytest.raises(CannotRender, match="does not render") as caught:
        template_of(source).encode_prompt(asked, example.tools)
    assert lost.partition(",")[0] in caught.value.message


def test_a_refusal_without_content_is_the_content() -> None:
    for content in (None, ""):
        refused = row(USER, {"role": "assistant", "content": content, "refusal": "I cannot."})
        assert template_of(CHATML).render(refused.messages).endswith("assistant\nI cannot.<|im_end|>\n")


def test_the_name_of_the_call_that_a_result_answers_is_no_loss() -> None:
    nameless = template_of(without("{{ m.name or '' }}"))
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}}

    nameless.encode_all(row(USER, CALL, {**RESULT, "name": "look"}, ANSWER), 10_000)
    nameless.encode_all(row(USER, legacy, {"role": "function", "name": "look", "content": "x"}, ANSWER), 10_000)
    with pytest.raises(CannotRender, match="'name' of message 3"):
        nameless.encode_all(row(USER, CALL, {**RESULT, "name": "other"}, ANSWER), 10_000)


def test_thinking_that_is_shown_in_the_last_turn_alone_is_no_loss() -> None:
    thinks = {**ANSWER, "reasoning_content": "because"}

    parts = template_of(QWEN3_LIKE).encode_all(row(USER, thinks, USER, ANSWER), 10_000)

    assert len(parts) == 2
    template_of(QWEN3_LIKE).encode_prompt(row(USER, thinks, USER, ANSWER).messages[:3])


def test_a_shape_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(ALL)
    tried: list[Any] = []
    attempt = template._fields._try
    monkeypatch.setattr(template._fields, "_try", lambda *given: tried.append(given) or attempt(*given))

    for text in ("a", "b", "c" * 1000):
        template.encode_all(row({"role": "system", "content": text}, {**USER, "content": text}, ANSWER), 10_000)
    template.encode_all(row(USER, CALL, RESULT, ANSWER), 10_000)

    assert len(tried) == 2


@pytest.mark.parametrize("given", [None, ""])
@pytest.mark.parametrize(
    "body",
    [
        "{% if m.content is none %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}",
        "{{ m.content + m.tool_calls | tojson if m.tool_calls else m.content }}",
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}",
    ],
    ids=["null marks a call", "null fails", "null is written"],
)
def test_empty_content_beside_calls_is_written_as_the_template_shows_them(given: str | None, body: str) -> None:
    template = template_of(TURNS.replace("BODY", body) + ASKS)

    [rendered] = template.encode_all(row(USER, {**CALL, "content": given}), 10_000)

    [call] = json.loads(template.answer_text([label for label in rendered.labels if label >= 0]))
    assert call["function"] == {"name": "look", "arguments": {"at": "é", "n": 2, "on": True}}


def test_each_answer_of_a_row_is_written_as_its_own_text_shows_it() -> None:
    body = (
        "{% if m.tool_calls and (m.content is none) != loop.last %}{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}"
    )
    template = template_of(TURNS.replace("BODY", body) + ASKS)

    first, second = template.encode_all(row(USER, CALL, RESULT, ANSWER), 10_000)

    [call] = json.loads(template.answer_text([label for label in first.labels if label >= 0]))
    assert call["function"]["name"] == "look"
    assert template.answer_text([label for label in second.labels if label >= 0]) == "a"


def test_a_call_that_no_form_shows_is_refused() -> None:
    with pytest.raises(CannotRender, match="does not render tool calls"):
        template_of(CHATML).encode_all(row(USER, CALL), 10_000)


VERDICTS = {
    "tool_content_empty": (CHATML, "does not render tools or tool calls"),
    "reasoning": (CHATML, "does not render thinking, so 'reasoning_content' of message 2"),
    "tool_result": (
        (DATA / "templates/user_and_assistant_only.jinja").read_text(),
        "tool results, so 'content' of mes",
    ),
    "test_tool_rows": (CHATML, "does not render tool calls"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_faulty_files_are_refused_with_line_and_field(name: str) -> None:
    source, reason = VERDICTS[name]
    row, example = next(read_examples([(DATA / f"faults/{name}.jsonl").read_bytes()], "training"))

    with pytest.raises(InvalidTrainingFile, match=r"Example 1: The model's chat template") as caught:
        encode_example(template_of(source), example, row, max_length=10_000)
    assert reason in caught.value.message


@pytest.mark.parametrize("name", ["tool_content_empty", "reasoning", "tool_result", "test_tool_rows"])
def test_the_same_files_are_learned_where_the_template_shows_them(name: str) -> None:
    template = template_of(ALL)
    for row, example in read_examples([(DATA / f"faults/{name}.jsonl").read_bytes()], "training"):
        last = example.messages[-1]
        [learned] = encode_example(template, example, row, max_length=10_000).sequences
        text = template.answer_text([label for label in learned.labels if label >= 0])
        for call in last.tool_calls or ():
            assert call.function.name in text
        assert (last.reasoning_content or "") in text


def test_tools_in_chat_are_refused_where_the_template_has_none() -> None:
    tools = [Tool.model_validate(TOOL)]

    with pytest.raises(CannotRender, match="does not render tools, so"):
        template_of(CHATML).encode_prompt([Message(role="user", content="q")], tools)
    assert "look" in template_of(LLAMA_LIKE).render([Message(role="user", content="q")], tools)
