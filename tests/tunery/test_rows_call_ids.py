"""Tool results without the id of their call, as TRL's and other data sets have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from templates import family

from tunery.rows.encoding import read_examples
from tunery.rows.messages import Example

SHAPES = Path(__file__).parents[1] / "data/shapes"
Turn = dict[str, Any]


def call(name: str, id: str | None = None) -> Turn:
    made = {"type": "function", "function": {"name": name, "arguments": {}}}
    return made if id is None else {"id": id, **made}


def calls(*some: Turn) -> Turn:
    return {"role": "assistant", "content": "", "tool_calls": list(some)}


def result(text: str, **fields: Any) -> Turn:
    return {"role": "tool", "content": text, **fields}


def read(*turns: Turn) -> Example:
    messages = [{"role": "user", "content": "q"}, *turns, {"role": "assistant", "content": "a"}]
    [(_, example)] = read_examples([json.dumps({"messages": messages}).encode()], "training")
    return example


def answered(example: Example) -> dict[str | None, str]:
    """The function whose call each result answers."""
    names = {call.id: call.function.name for message in example.messages for call in message.tool_calls or ()}
    assert None not in names
    return {said.content: names.get(said.tool_call_id, "none") for said in example.messages if said.role == "tool"}


@pytest.mark.parametrize(
    ("turns", "pairs"),
    [
        ([calls(call("f")), result("1")], {"1": "f"}),
        ([calls(call("f")), result("1"), calls(call("g")), result("2")], {"1": "f", "2": "g"}),
        ([calls(call("f"), call("g")), result("1"), result("2")], {"1": "f", "2": "g"}),
        ([calls(call("f"), call("g")), result("1", name="g"), result("2", name="f")], {"1": "g", "2": "f"}),
        ([calls(call("f"), call("f")), result("1", name="f"), result("2", name="x")], {"1": "f", "2": "f"}),
        ([calls(call("f", "c1"), call("g")), result("1"), result("2")], {"1": "f", "2": "g"}),
        ([calls(call("f", "c1"), call("g", "c2")), result("1", tool_call_id="c1"), result("2")], {"1": "f", "2": "g"}),
        ([calls(call("f")), result("1"), result("2")], {"1": "f", "2": "none"}),
        ([{"role": "assistant", "content": "<tool_call>f()</tool_call>"}, result("1")], {"1": "none"}),
    ],
)
def test_a_result_without_an_id_answers_the_first_open_call(turns: list[Turn], pairs: dict[str, str]) -> None:
    assert answered(read(*turns)) == pairs


def test_ids_that_are_given_are_kept() -> None:
    example = read(calls(call("f", "c9")), result("1"), calls(call("g")), result("2", tool_call_id="own"))
    assert [made.id for message in example.messages for made in message.tool_calls or ()] == ["c9", "call00000"]
    assert [said.tool_call_id for said in example.messages if said.role == "tool"] == ["c9", "own"]


def test_calls_stay_without_ids_where_no_result_needs_one() -> None:
    [made] = read(calls(call("f"))).messages[1].tool_calls or []
    assert made.id is None


@pytest.mark.parametrize("name", ["llama3_1", "mistral_v3", "qwen2_5"])
def test_filled_ids_can_be_rendered(name: str) -> None:
    """Mistral's templates refuse ids that are not nine letters and digits."""
    [(_, single), _] = read_examples([(SHAPES / "sharegpt_tools.jsonl").read_bytes()], "training")
    for example in (single, read(calls(call("f")), result("1"))):
        [row] = family(name).encode_all(example, 100_000)
        assert row.trained_tokens
