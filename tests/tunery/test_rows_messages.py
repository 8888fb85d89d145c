"""Lines of training files: what is accepted, and with which messages the rest is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.failures import InvalidTrainingFile
from tunery.rows import strict_json
from tunery.rows.messages import parse_line

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def row(*messages: Any, **fields: Any) -> str:
    return json.dumps({"messages": messages, **fields})


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def with_arguments(arguments: object) -> str:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    return row(USER, {"role": "assistant", "tool_calls": [call]})


def part(**fields: Any) -> str:
    return row({"role": "user", "content": [{"type": "text", "text": "see"}, fields]}, ANSWER)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (row(USER, {"content": "a"}), "Example 9, message 2 Discriminator 'role' is missing in value. Give"),
        (row(USER, {"role": "bot", "content": "a"}), 'Example 9, message 2 has the unknown role "bot". Use system'),
        (row({"role": "user"}, ANSWER), "Example 9, message 1 has no 'content'. Give it a text."),
        (
            row({"role": "user", "content": 5}, ANSWER),
            "Example 9, message 1 'content' must be a string or a list of text",
        ),
        (row(USER), "Example 9 has no assistant message"),
        (row(USER, {**ANSWER, "weight": 0}), "Example 9 gives every assistant message the weight 0"),
        (row(USER, {**ANSWER, "weight": 2}), "Example 9, message 2 'weight' must be 0 (not learned from) or 1"),
        (row(USER, {**ANSWER, "weight": True}), "Example 9, message 2 'weight' must be 0 (not learned from) or 1"),
        (row(USER, {**ANSWER, "weight": [1]}), "Example 9, message 2 'weight' must be 0 (not learned from) or 1"),
        (row({**USER, "weight": 1}, ANSWER), "Example 9, message 1 has 'weight', which only an assistant"),
        (row({**USER, "wieght": 1}, ANSWER), "Example 9, message 1 has the unknown key 'wieght'. Remove it."),
        (row("hello"), 'Example 9, message 1 must be an object in braces, not "hello".'),
        (row(), "Example 9 'messages' must not be empty."),
        (row(USER, ANSWER, tools=[{"type": "function"}]), "Example 9, tool 1 has no 'function'."),
        (
            row(USER, ANSWER, parallel_tool_calls="yes"),
            "Example 9 'parallel_tool_calls' must be true or false",
        ),
        (with_arguments("{"), "Example 9, message 2, tool_call 1 'function.arguments' must be a JSON object"),
        (with_arguments([]), "Example 9, message 2, tool_call 1 'function.arguments' must be a string, not a list."),
        (with_arguments('"{"'), "Example 9, message 2, tool_call 1 'function.arguments' must be a JSON object"),
        (
            with_arguments('{"n": 1, "n": 2}'),
            "Example 9, message 2, tool_call 1 'function.arguments' must be a JSON object",
        ),
        (with_arguments("[1]"), "Example 9, message 2, tool_call 1 'function.arguments' must be a JSON object"),
        (
            row(USER, ANSWER, tools=[TOOL], functions=[TOOL["function"]]),
            "Example 9 has both 'tools' and its older name 'functions'",
        ),
        (row(USER, ANSWER, functions=7), "Example 9 'functions' must be a list, not 7."),
        (row(USER, ANSWER, tools="7"), "Example 9 'tools' must be a list, not 7."),
        (row(USER, ANSWER, tools="[{"), "Example 9 'tools' must be a list, or a JSON list written as a string: "),
        (
            row(USER, {**ANSWER, "train": False}),
            "Example 9, message 2 has the unknown key 'train'. To exclude a message",
        ),
        (
            row(USER, {**ANSWER, "thinking": "t"}),
            "Example 9, message 2 has the unknown key 'thinking'. Reasoning before",
        ),
        (row({**USER, "images": ["u"]}, ANSWER), "Example 9, message 1 has the unknown key 'images'. Only text is"),
        (
            row({**USER, "annotations": [1]}, ANSWER),
            "Example 9, message 1 has the unknown key 'annotations'. Remove it.",
        ),
        (
            part(type="image_url", image_url={"url": "u"}),
            "Example 9, message 1 has a part of type 'image_url'. Only text",
        ),
        (part(text="x"), "Example 9, message 1 has a part without a type."),
        (part(type="text"), "Example 9, message 1 has a text part without 'text'."),
        (part(type="text", text="x", image_url="u"), "Example 9, message 1 has a text part with the unknown key 'ima"),
        ('{"input": {}, "preferred_output": []}', "Example 9: Unexpected file format: this is a preference row (DPO)"),
        (
            '{"prompt": "a", "completion": "b", "label": false}',
            "Example 9 has the key 'label', which marks the answer as good or bad (KTO)",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "Example 9: Unexpected file format: this is a preference"),
        (
            json.dumps({"messages": "[{'role': 'user', 'content': 'q'}]"}),
            "Example 9 'messages' must be a list, or a JSON list written as a string: it is a Python literal; write it "
            "with json.dumps (column 3).",
        ),
        (
            json.dumps({"conversations": "[{'from': 'human', 'value': 'q'}]"}),
            "Example 9: 'conversations' must be a list, or a JSON list written as a string: it is a Python literal;",
        ),
        ('{"conversations": []}', "Example 9 'messages' must not be empty."),
        (
            '{"messages": null}',
            "Example 9: Unexpected file format: the row is like those of chat messages, but has no value in 'messages'",
        ),
        ("[]", "Example 9: expected a JSON object in braces, found a list."),
        ("{", "Example 9: the object does not end on this line (column 2)."),
    ],
)
def test_a_wrong_line_is_refused_by_number_and_reason(line: str, reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        parse_line(line, 9)

    wanted = f"The job failed due to an invalid training file. Invalid file format. {reason}"
    assert caught.value.message.startswith(wanted)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")


def test_braces_in_the_users_words_do_no_harm() -> None:
    with pytest.raises(InvalidTrainingFile, match=r"unknown role \"\{line\}\""):
        parse_line(row({"role": "{line}", "content": "{0}"}), 1, "validation")


def test_ids_sources_and_nulls_are_fine() -> None:
    empty = {"tool_calls": None, "name": None, "weight": None}
    parsed = parse_line(row(USER, {**ANSWER, **empty}, id="x", source={"licence": "CC0"}, tools=None), 1)

    assert [message.for_template() for message in parsed.messages] == [USER, ANSWER]


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert parse_line(row({"role": "user", "content": parts}, ANSWER), 1).messages[0].content == "one\ntwo"


def test_a_refusal_is_what_the_assistant_says() -> None:
    parsed = parse_line(row(USER, {"role": "assistant", "content": None, "refusal": "I cannot."}), 1)

    assert parsed.messages[1].for_template() == {"role": "assistant", "content": "I cannot."}


def nested(depth: int) -> str:
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits, more than 1000; write it as a string"),
        ('{"a": "\\ud83d"}', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ('{"a": ["\\u0000"]}', "character NUL"),
        ('{"\\u0000": 1}', "character NUL"),
        (
            '{"messages": [], "id": 1, "messages": []}',
            'the key "messages" twice. Keep one of them, or rename the other',
        ),
        ('{"a": [{"b": {"c": 1, "c": 2}}]}', 'the key "c" twice'),
        ('{"content": "x", "\\u0063ontent": "y"}', 'the key "content" twice'),
        ('{"x": 0, ' + ", ".join(f'"{at}": 0' for at in range(200_000)) + ', "x": 0}', 'the key "x" twice'),
        (nested(strict_json.MAX_DEPTH + 1), "more than 32 deep"),
        ("[" * 100_000, "more than 32 deep"),
        ("null", "found null"),
        ("true", "found a boolean"),
        ("3", "found a number"),
        ('{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_json_that_python_would_take_and_others_would_not(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        strict_json.load_object(text)


def test_depth_and_surrogate_pairs_within_the_limits() -> None:
    strict_json.load_object(nested(strict_json.MAX_DEPTH))
    strict_json.load_object('{"a": [' + ",".join(["[]"] * 100) + "]}")
    assert strict_json.load_object('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    assert strict_json.load_object('{"a": "\\\\u0000"}') == {"a": "\\u0000"}, "an escaped backslash, no NUL"


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(TEXT, JSON, max_size=4), st.booleans())
def test_what_json_writes_is_read_back(value: dict[str, Any], ascii_only: bool) -> None:
    assert strict_json.load_object(json.dumps(value, ensure_ascii=ascii_only)) == value
