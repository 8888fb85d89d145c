"""The spellings of a row: which are read alike, which change its meaning, and which messages refuse the others."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageFunctionToolCall

from tunery.errors import InvalidValue, Unsupported
from tunery.failures import InvalidTrainingFile
from tunery.rows.messages import parse_line
from worker.server.schemas import parse

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def row(*messages: Any, **fields: Any) -> str:
    return json.dumps({"messages": messages, **fields})


def with_arguments(arguments: object) -> str:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    return row(USER, {"role": "assistant", "tool_calls": [call]})


def read(line: str) -> dict[str, Any]:
    """The conversation of a line, in the one spelling as which all others are read."""
    return parse_line(line, 1).model_dump(include={"messages", "tools", "parallel_tool_calls"}, exclude_none=True)


PLAIN = read(row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[TOOL]))


@pytest.mark.parametrize(
    "line",
    [
        row(USER, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}, tools=[TOOL]),
        row(USER, {"role": "assistant", "tool_calls": [{**CALL, "index": None, "type": None}]}, tools=[TOOL]),
        row(USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}, tools=json.dumps([TOOL])),
        json.dumps({"messages": json.dumps([USER, {"role": "assistant", "tool_calls": [CALL]}]), "tools": [TOOL]}),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[{"function": {"name": "f", "strict": None}}]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[{"type": None, "function": {"name": "f"}}]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, functions=[{"name": "f", "parameters": None}]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[json.dumps(TOOL)]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[json.dumps({"name": "f"})]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=[{**TOOL, "function": json.dumps({"name": "f"})}]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, functions=[json.dumps({"name": "f", "parameters": ""})]),
        row(USER, {"role": "assistant", "tool_calls": [CALL]}, tools=None, functions=json.dumps([{"name": "f"}])),
        row({**USER, "content": ["q"]}, {"role": "assistant", "tool_calls": [CALL]}, tools=[TOOL], functions=[]),
        *(
            row(
                USER,
                {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]},
                tools=[TOOL],
                parallel_tool_calls=None,
            )
            for arguments in ("", " ", None, {}, "{}", '"{}"')
        ),
        row(
            USER,
            {
                "role": "assistant",
                "annotations": [{"type": "url_citation"}],
                "audio": {"id": "a"},
                "parsed": 1,
                "tool_calls": [{**CALL, "function": {**CALL["function"], "parsed_arguments": {}}}],
            },
            tools=[TOOL],
        ),
    ],
)
def test_every_spelling_of_one_conversation_is_read_alike(line: str) -> None:
    found = read(line)
    for message in found["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = call["function"]["arguments"].strip()
    assert found == PLAIN


def test_parameters_may_be_a_json_string() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    for parameters in (schema, json.dumps(schema)):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        for tools in ([tool], [json.dumps(tool)], json.dumps([tool])):
            assert read(row(USER, ANSWER, tools=tools))["tools"][0]["function"]["parameters"] == schema


@pytest.mark.parametrize("arguments", [{"city": "Ålesund", "n": 1.5}, '{"city": "Ålesund", "n": 1.5}'])
@pytest.mark.parametrize("times", [0, 1])
def test_arguments_keep_their_values(arguments: object, times: int) -> None:
    for _ in range(times):
        arguments = json.dumps(arguments)
    [call] = parse_line(with_arguments(arguments), 1).messages[1].tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Ålesund", "n": 1.5}


def test_nulls_inside_a_schema_and_arguments_are_values() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}}
    call = {**CALL, "function": {"name": "f", "arguments": {"x": None}}}
    parsed = parse_line(row(USER, {"role": "assistant", "tool_calls": [call]}, tools=[tool]), 1)

    assert [made.for_template() for made in parsed.tools or []] == [tool]
    [made] = parsed.messages[1].tool_calls or []
    assert made.for_template()["function"]["arguments"] == {"x": None}


def test_null_absent_and_empty_content_stay_apart() -> None:
    contents = [
        parse_line(row(USER, {"role": "assistant", **given, "tool_calls": [CALL]}), 1).messages[1].content
        for given in ({}, {"content": None}, {"content": ""})
    ]
    assert contents == [None, None, ""]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("label", False, "marks the answer as good or bad (KTO)"),
        ("kto_tag", True, "marks the answer as good or bad (KTO)"),
        ("score", 0, "rates the answer"),
        ("rating", 4.5, "rates the answer"),
        ("reward", -1, "rates the answer"),
        ("chosen", [ANSWER], "belongs to a preference row (DPO)"),
        ("rejected", "b", "belongs to a preference row (DPO)"),
        ("score_chosen", 3.0, "belongs to a preference row (DPO)"),
        ("preferred_output", [ANSWER], "belongs to a preference row (DPO)"),
        ("non_preferred_output", [ANSWER], "belongs to a preference row (DPO)"),
        ("weight", 0.5, "weights the row"),
        ("loss_mask", [0, 1], "selects what is learned"),
        ("images", ["u"], "contains images, audio or files, but only text is supported"),
        ("image", "u", "contains images"),
        ("videos", ["u"], "contains images"),
        ("audios", ["u"], "contains images"),
        ("chat_template_kwargs", {"enable_thinking": False}, "changes how a template renders the row"),
        ("documents", [{"text": "d"}], "changes how a template renders the row"),
        ("system", "Be brief.", "would be ignored. Put it into 'messages' as the first message"),
        ("history", [["q", "a"]], "would be ignored. Put the earlier turns into 'messages'"),
    ],
)
def test_a_key_that_changes_the_rows_meaning_is_refused(key: str, value: object, reason: str) -> None:
    with pytest.raises(InvalidTrainingFile) as caught:
        parse_line(row(USER, ANSWER, **{key: value}), 9)
    assert f"Example 9 has the key '{key}', which {reason}" in caught.value.message
    assert parse_line(row(USER, ANSWER, **{key: None}), 9).unknown_keys == []


def test_keys_without_a_meaning_are_named() -> None:
    kept = {"id": 1, "source": "s", "prompt": "q", "images": [], "system": "Be brief."}
    parsed = parse_line(row({"role": "system", "content": "Be brief."}, USER, ANSWER, **kept), 1)
    assert parsed.unknown_keys == list(kept)[1:], "an id is the row's own name"


OFFICIAL = ChatCompletionMessage(
    role="assistant",
    content="a",
    annotations=[],
    tool_calls=[ChatCompletionMessageFunctionToolCall(id="c", type="function", function=CALL["function"])],
)


@pytest.mark.parametrize("options", [{}, {"exclude_none": True}, {"mode": "json"}])
def test_an_answer_is_learned_as_the_official_client_dumps_it(options: dict[str, Any]) -> None:
    dumped = OFFICIAL.model_dump(**options)
    assert read(row(USER, dumped)) == read(row(USER, {**ANSWER, "tool_calls": [CALL]}))


WRONG_VALUES = [0, 1.5, True, "x", "", [], {}, [None], [[]], [{}], {"x": 1}, [0]]
PYDANTIC = re.compile(
    r"Input should|should be a valid|Field required|Extra inputs|should have at|Value error|valid dict"
)


def _spoilt(value: Any, wrong: Any) -> Iterator[Any]:
    """Yields copies of a value, each with a different part replaced by `wrong`."""
    yield wrong
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for spoilt in _spoilt(part, wrong):
            made = copy.copy(value)
            made[key] = spoilt
            yield made


@pytest.mark.parametrize("wrong", WRONG_VALUES, ids=repr)
def test_a_wrong_value_is_refused_in_our_words(wrong: object) -> None:
    """Replaces every part of a full row in turn: a number for a string, a list for an object, and so on."""
    called = {**ANSWER, "weight": 1, "tool_calls": [CALL], "refusal": "r", "reasoning_content": "t", "name": "n"}
    legacy = {"role": "assistant", "function_call": CALL["function"]}
    tool = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "t"}]}
    schema = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}, "strict": True}}
    full = {"messages": [USER, called, tool, legacy], "tools": [schema], "parallel_tool_calls": True}
    parse_line(json.dumps(full), 1)

    refused = []
    for spoilt in _spoilt(full, wrong):
        for line in (json.dumps(spoilt), json.dumps({**full, "functions": wrong, "tools": None})):
            try:
                parse_line(line, 1)
            except InvalidTrainingFile as error:
                refused.append(error.message)
    assert len(refused) > 20
    assert [message for message in refused if PYDANTIC.search(message)] == []


CHOSEN = {"base": {"id": "b", "prefix": "p", "manifest_sha256": "0" * 64}}


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], "tunery_model": CHOSEN, **fields}).encode()


def test_chat_reads_a_message_as_training_does() -> None:
    """The answer is a dump of the official client, with nulls, outputs and arguments in every spelling."""
    calls = [{**CALL, "index": n, "function": {"name": "f", "arguments": a}} for n, a in enumerate(("", {}, '"{}"'))]
    said = {**OFFICIAL.model_dump(), "tool_calls": calls, "audio": {"id": "a"}, "parsed": {}, "weight": None}
    tools = [{"type": None, "function": {"name": "f", "strict": None}}]

    last = {"role": "user", "content": ["q"], "name": None}
    nulls = {"temperature": None, "stop": None, "stream_options": {"include_usage": None}, "tool_choice": None}
    request = parse(asked(messages=[USER, said, last], tools=tools, **nulls))
    example = parse_line(row(USER, said, {"role": "user", "content": ["q"]}, tools=tools), 1)

    assert (request.messages, request.tools) == (example.messages, example.tools)


def test_a_chat_says_which_call_a_result_answers() -> None:
    """As in OpenAI's API, though rows may leave it out."""
    said = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "t"}]
    with pytest.raises(InvalidValue, match="is a tool result without 'tool_call_id'"):
        parse(asked(messages=said))


@pytest.mark.parametrize("wrong", WRONG_VALUES, ids=repr)
def test_chat_refuses_a_wrong_value_in_our_words(wrong: object) -> None:
    numbers = ("max_completion_tokens", "max_tokens", "temperature", "top_p", "seed", "stream", "tool_choice", "stop")
    full = {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}], "tools": [TOOL], "stream_options": {}}
    bodies = [asked(**spoilt) for spoilt in _spoilt(full, wrong) if isinstance(spoilt, dict)]
    bodies += [asked(**{name: wrong}) for name in numbers]

    refused = []
    for body in bodies:
        try:
            parse(body)
        except (InvalidValue, Unsupported) as error:
            refused.append(error.message)
    assert len(refused) > 5
    assert [message for message in refused if PYDANTIC.search(message)] == []
