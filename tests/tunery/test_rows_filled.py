"""Exports of tables fill tools and calls with nulls, which no model may learn."""

import io
import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tunery.rows import filled
from tunery.rows.encoding import read_examples, read_rows
from tunery.rows.preferences import parse_pair

Row = dict[str, Any]
USER = {"role": "user", "content": "q"}
FIND = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
COUNT = {"type": "object", "properties": {"n": {"type": "integer", "enum": [1, 2]}}, "required": ["n"]}
CALLS = [("find", FIND, {"city": "Bern"}), ("count", COUNT, {"n": 2}), ("count", COUNT, {})]


def row(name: str, parameters: Row, arguments: Row) -> Row:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}


TABLE = pyarrow.Table.from_pylist([row(*call) for call in CALLS])


def as_parquet() -> bytes:
    made = io.BytesIO()
    parquet.write_table(TABLE, made)
    return made.getvalue()


def as_json_lines() -> bytes:
    """As `datasets` and pandas export it, with the nulls."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in TABLE.to_pylist())


@pytest.mark.parametrize("export", [as_parquet, as_json_lines])
def test_calls_and_tools_have_no_members_of_others(export: Any) -> None:
    assert TABLE.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern", "n": None}
    found = [example for _, example in read_examples([export()], "training")]
    # In JSON Lines a null of the function's own argument may be what its author wrote.
    wanted = CALLS if export is as_parquet else [*CALLS[:2], ("count", COUNT, {"n": None})]
    for example, (name, parameters, arguments) in zip(found, wanted, strict=True):
        [call] = example.messages[1].tool_calls or []
        assert call.for_template()["function"] == {"name": name, "arguments": arguments}
        [tool] = example.tools or []
        assert tool.for_template()["function"] == {"name": name, "parameters": parameters}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": {"default": None}, "default": {"const": None}, "y": {"enum": ["a", None]}}},
        {"properties": {"x": {"type": ["string", "null"], "examples": [None], "default": {"a": None}}}},
        {"items": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "$defs": {"a": {}}},
        True,
    ],
)
def test_nulls_that_a_schema_means_are_kept(schema: Any) -> None:
    whole = {"properties": {"a": schema}}
    assert filled.clean_schema(whole) == whole


def test_nulls_of_other_records_are_dropped_at_any_depth() -> None:
    given = {
        "title": None,
        "properties": {
            "default": None,
            "a": {"type": "array", "items": {"type": "string", "enum": None}, "properties": None},
        },
        "anyOf": [{"type": "string", "items": None}],
        "$defs": {"b": None, "c": {"properties": {"d": None}}},
    }
    assert filled.clean_schema(given) == {
        "properties": {"a": {"type": "array", "items": {"type": "string", "enum": None}}},
        "anyOf": [{"type": "string"}],
        "$defs": {"c": {"properties": {}}},
    }


@pytest.mark.parametrize(
    ("properties", "given", "kept"),
    [
        ({"x": {"type": ["string", "null"]}}, {"x": None, "y": None}, {"x": None}),
        ({"x": {"properties": {"a": {}}}}, {"x": {"a": None, "b": None, "c": 1}}, {"x": {"a": None, "c": 1}}),
        ({"x": {"type": "object"}}, {"x": {"a": None}}, {"x": {"a": None}}),
        ({}, {"y": 1, "z": [None]}, {"y": 1, "z": [None]}),
    ],
)
def test_a_null_argument_is_kept_where_the_function_has_it(properties: Row, given: Row, kept: Row) -> None:
    made = row("f", {"type": "object", "properties": properties}, given)
    [(_, example)] = read_examples([json.dumps(made).encode()], "training")
    [call] = example.messages[1].tool_calls or []
    assert json.loads(call.function.arguments) == kept


def test_both_answers_of_a_pair_are_cleaned() -> None:
    made = row("f", {"type": "object", "properties": {"x": {}}}, {"x": 1, "y": None})
    other = row("f", {}, {"x": 2, "y": None})
    asked, preferred = made["messages"]
    pair = {"input": {"messages": [asked], "tools": made["tools"]}, "preferred_output": [preferred]}
    pair["non_preferred_output"] = other["messages"][1:]
    [source] = read_rows([json.dumps(pair).encode()], "training")
    found = parse_pair(source)
    calls = [call for said in (found.messages[-1], found.dispreferred) for call in said.tool_calls or ()]
    assert [json.loads(call.function.arguments) for call in calls] == [{"x": 1}, {"x": 2}]


def test_nulls_of_arguments_that_are_a_string_were_written_by_someone() -> None:
    made = row("f", {"type": "object", "properties": {}}, {"y": None})
    call = made["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(call["arguments"])
    [(_, example)] = read_examples([json.dumps(made).encode()], "training")
    [found] = example.messages[1].tool_calls or []
    assert json.loads(found.function.arguments) == {"y": None}
