"""Our rendering against transformers' apply_chat_template: the same templates must say the same to both."""

from pathlib import Path
from typing import Any

import pytest
from templates import SHAPES, model_folder

from tunery.rendering.messages import Message, Tool
from tunery.rendering.template import ChatTemplate

SYSTEM = {"role": "system", "content": " Be brief. "}
QUESTION = {"role": "user", "content": "Capital of <b>France</b>? 🗼\n"}
ANSWER = {"role": "assistant", "content": "Paris."}
THOUGHT = {"role": "assistant", "content": "Paris.", "reasoning_content": "Easy."}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"what": "<é>", "n": 1}}}],
}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "found"}
FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds 'it' & more",
        "parameters": {"type": "object", "properties": {}},
    },
}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([QUESTION, ANSWER], None),
    "two turns": ([QUESTION, ANSWER, QUESTION, ANSWER], None),
    "system": ([SYSTEM, QUESTION, ANSWER, QUESTION], None),
    "thinking": ([QUESTION, THOUGHT, QUESTION, THOUGHT], None),
    "tools": ([QUESTION, CALL, RESULT, ANSWER], [FIND]),
}
TALKS_OF_TOOLS = {"llama"}
NO_SYSTEM = {"mistral"}


def as_ours(message: dict[str, Any]) -> Message:
    import json

    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return Message.model_validate({**message, "tool_calls": calls})


@pytest.fixture(scope="module", params=SHAPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatTemplate, Any]:
    transformers = pytest.importorskip("transformers")
    folder: Path = model_folder(tmp_path_factory.mktemp("model"), SHAPES[request.param])
    return request.param, ChatTemplate.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompting", [False, True])
def test_text_and_ids_are_those_of_transformers(
    both: tuple[str, ChatTemplate, Any], conversation: str, prompting: bool
) -> None:
    shape, template, theirs = both
    messages, tools = CONVERSATIONS[conversation]
    if (tools and shape not in TALKS_OF_TOOLS) or (SYSTEM in messages and shape in NO_SYSTEM):
        pytest.skip("not a conversation for this template")
    ours = [as_ours(message) for message in messages]
    our_tools = [Tool.model_validate(tool) for tool in tools] if tools else None

    wanted = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompting, tokenize=False)
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)

    assert template.render(ours, our_tools, add_generation_prompt=prompting) == wanted
    assert template.encode_prompt(ours, our_tools) == ids
