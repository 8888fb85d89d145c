"""Our rendering, compared with transformers' apply_chat_template: the same templates must give the same text."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from templates import SHAPES, blanks_together, model_folder
from transformers import AutoTokenizer

from tunery.rows.encoding import read_examples
from tunery.rows.messages import Message, Tool
from tunery.rows.template import ChatTemplate

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
CASES = [
    (shape, name)
    for shape in SHAPES
    for name in CONVERSATIONS
    if (name != "tools" or shape == "llama")
    and (name != "thinking" or shape == "qwen3")
    and (name != "system" or shape != "mistral")
]
"""The conversations that each template can render."""


def as_ours(message: dict[str, Any]) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return Message.model_validate({**message, "tool_calls": calls})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[ChatTemplate, Any]]:
    """Our template and transformers' tokenizer, loaded from the same directory."""

    @cache
    def load(shape: str) -> tuple[ChatTemplate, Any]:
        folder = model_folder(tmp_path_factory.mktemp("model"), SHAPES[shape])
        return ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)

    return load


@pytest.mark.parametrize(("shape", "conversation"), CASES)
@pytest.mark.parametrize("prompting", [False, True])
def test_text_and_ids_are_those_of_transformers(
    both: Callable[[str], tuple[ChatTemplate, Any]], shape: str, conversation: str, prompting: bool
) -> None:
    template, theirs = both(shape)
    messages, tools = CONVERSATIONS[conversation]
    ours = [as_ours(message) for message in messages]
    our_tools = [Tool.model_validate(tool) for tool in tools] if tools else None

    wanted = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompting, tokenize=False)
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)

    assert template.render(ours, our_tools, add_generation_prompt=prompting) == wanted
    assert template.encode_prompt(ours, our_tools) == ids


TREE = Path(__file__).parents[2]


def test_rows_have_the_ids_of_transformers_but_where_a_token_straddles(tmp_path: Path) -> None:
    """Compares every twentieth public row of the examples, and rows whose answers begin with blanks."""
    folder = model_folder(tmp_path, SHAPES["chatml"], blanks_together())
    template, theirs = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    counts = {"equal": 0, "straddling": 0}
    for path in (*sorted((TREE / "examples").glob("*.jsonl")), TREE / "tests/data/faults/indented_answer.jsonl"):
        step = 20 if path.parent.name == "examples" else 1
        for _, example in [*read_examples([path.read_bytes()], "training")][::step]:
            messages = [message.for_template() for message in example.messages]
            whole = theirs.apply_chat_template(messages, return_dict=False)
            prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            [row] = template.encode_all(example, 100_000)

            assert row.input_ids[: len(prompt)] == prompt
            straddles = whole[: len(prompt)] != prompt
            assert straddles or row.input_ids == whole
            counts["straddling" if straddles else "equal"] += 1

    assert counts == {"equal": 323, "straddling": 12}
