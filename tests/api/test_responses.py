"""The Responses API through the official client: chat completions in another format, of which nothing is stored."""

from typing import Any

import openai
import pytest
from model_server import ModelServer
from pydantic import BaseModel
from teams import ALIAS, BASE, Team

CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"n": 3}'}}
FIND: Any = {
    "type": "function",
    "name": "find",
    "description": "Finds",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
    "strict": True,
}


def test_a_text_is_answered(asking: Team, server: ModelServer) -> None:
    made = asking.openai(strict=True).responses.create(
        model=ALIAS, input="Where?", instructions="Be brief.", max_output_tokens=9, temperature=0, store=False
    )

    assert (made.output_text, made.status, made.store) == ("a", "completed", False)
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (5, 2, 7)
    assert made.usage.input_tokens_details.cached_tokens == 3
    assert (made.instructions, made.max_output_tokens, made.temperature) == ("Be brief.", 9, 0)
    [received] = server.received
    assert received["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert (received["max_completion_tokens"], received["temperature"]) == (9, 0)
    assert received["tunery_model"]["base"]["id"] == BASE


def test_a_conversation_with_calls_becomes_messages(asking: Team, server: ModelServer) -> None:
    server.message, server.finish_reason = {"content": None, "tool_calls": [CALL]}, "tool_calls"
    client = asking.openai(strict=True)

    first = client.responses.create(model=BASE, input="Find 3.", tools=[FIND], tool_choice="required")
    [call] = first.output
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments) == ("call_1", "find", '{"n": 3}')

    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "found"}
    asked: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Find 3."}]}, *first.output, result]
    client.responses.create(model=BASE, input=asked, tools=[FIND], tool_choice={"type": "function", "name": "find"})

    named, sent = server.received
    assert named["tool_choice"] == "required"
    assert named["tools"] == [
        {"type": "function", "function": {name: FIND[name] for name in ("name", "description", "parameters")}}
    ]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "find"}}
    assert sent["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "Find 3."}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "found"},
    ]


def test_calls_after_text_are_one_message(asking: Team, server: ModelServer) -> None:
    text: Any = {"role": "assistant", "content": "I look."}
    calls: list[Any] = [
        {"type": "function_call", "call_id": f"c{number}", "name": "find", "arguments": "{}"} for number in (1, 2)
    ]
    thought: Any = {"type": "reasoning", "id": "rs_1", "summary": []}
    asking.openai().responses.create(model=BASE, input=[thought, text, *calls, {"role": "user", "content": "And?"}])

    said, last = server.received[0]["messages"]
    assert said["content"] == "I look."
    assert [call["id"] for call in said["tool_calls"]] == ["c1", "c2"]
    assert last == {"role": "user", "content": "And?"}


class Card(BaseModel):
    colour: str


def test_a_class_is_read_from_an_answer(asking: Team, server: ModelServer) -> None:
    server.message = {"content": '{"colour": "red"}'}

    made = asking.openai().responses.parse(model=BASE, input="Which?", text_format=Card)

    assert made.output_parsed == Card(colour="red")
    wanted = server.received[0]["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["name"] == "Card"
    assert wanted["json_schema"]["schema"]["required"] == ["colour"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_stream_has_the_events_of_a_text(asking: Team, strict: bool) -> None:
    events = list(asking.openai(strict=strict).responses.create(model=BASE, input="Where?", stream=True))

    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "hello"


def test_a_stream_has_the_events_of_a_call(asking: Team, server: ModelServer) -> None:
    server.deltas = [{"content": "I look."}, {"tool_calls": [{"index": 0, **CALL}]}, {}]
    server.finish_reason = "tool_calls"

    with asking.openai().responses.stream(model=BASE, input="Find 3.", tools=[FIND]) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_response()

    assert "response.function_call_arguments.done" in kinds
    assert [item.type for item in made.output] == ["message", "function_call"]
    assert made.output[1].to_dict()["arguments"] == '{"n": 3}'


def test_an_answer_that_is_cut_off_is_incomplete(asking: Team, server: ModelServer) -> None:
    server.finish_reason = "length"
    client = asking.openai(strict=True)
    made = client.responses.create(model=BASE, input="Where?", max_output_tokens=1)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model=BASE, input="Where?", stream=True)
    assert last.type == "response.incomplete"


def test_a_stream_that_breaks_says_so(asking: Team, server: ModelServer) -> None:
    server.breaks = True
    *_, last = asking.openai().responses.create(model=BASE, input="Where?", stream=True)
    assert last.type == "error"
    assert last.code == "unavailable"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the whole conversation as 'input'"),
        ({"conversation": "conv_1"}, "conversation", "the whole conversation as 'input'"),
        ({"background": True}, "background", "read the answer"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "'input_image'",
        ),
        ({"tools": 5}, "tools", "tools"),
        ({"tools": ["find"]}, "tools.0", "tools"),
        ({"text": "json"}, "text", "text"),
        ({"text": {"format": "json_object"}}, "text.format", "format"),
        ({"include": 7}, "include", "include"),
        ({"tool_choice": 1}, "tool_choice", "tool_choice"),
        ({"nonsense": 1}, "nonsense", "Unrecognized request argument"),
        ({"max_output_token": 1}, "max_output_token", r"Did you mean 'max_output_tokens'\?"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    asking: Team, server: ModelServer, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        asking.openai().responses.create(**{"model": BASE, "input": "Where?", "extra_body": fields} | {})
    assert refused.value.param == param
    assert not server.received


def test_the_servers_refusals_pass_with_their_status(asking: Team, server: ModelServer) -> None:
    server.status = 400
    with pytest.raises(openai.BadRequestError) as refused:
        asking.openai().responses.create(model=BASE, input="Where?")
    assert refused.value.code == "unsupported"
