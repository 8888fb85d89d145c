"""Tool calls that do not fit the tools of their row, and results that answer no call."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning
from tunery.datasets.report import maker

CITY, DAYS = {"city": {"type": "string"}}, {"days": {"type": "integer"}}
SCHEMA = {"type": "object", "properties": CITY | DAYS, "required": ["city"]}
OSLO = {"city": "Oslo"}


def row(
    arguments: Any, name: str = "weather", answers: str = "call_1", schema: Any = SCHEMA, *, has_tools: bool = True
) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    return {
        "messages": [
            {"role": "user", "content": "Will it rain?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": answers, "content": "no"},
            {"role": "assistant", "content": "It will stay dry."},
        ],
        **({"tools": [tool]} if has_tools else {}),
    }


def found(tmp_path: Path, one: dict[str, Any]) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(one) + "\n")
    return [finding.why for finding in maker.make(path).findings if finding.kind == "wrong_calls"]


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (row(OSLO, "getWeather"), "Calls 'getWeather', but its tools are 'weather'."),
        (row({"days": 2}), "Calls 'weather' without 'city', which it requires."),
        (row(OSLO | {"town": "Bergen"}), "Calls 'weather' with 'town', but its arguments are 'city', 'days'."),
        (row(OSLO | {"days": "two"}), "Calls 'weather' with a 'days' that is not of the type integer."),
        (row(OSLO | {"days": True}), "Calls 'weather' with a 'days' that is not of the type integer."),
        (row(OSLO, answers="call_9"), "Has a tool result for the call 'call_9', which no message before it makes."),
    ],
)
def test_calls_that_do_not_fit(tmp_path: Path, one: dict[str, Any], why: str) -> None:
    assert found(tmp_path, one) == [why]


@pytest.mark.parametrize(
    "one",
    [
        row(OSLO),
        row(OSLO | {"days": 2.0}),
        row(OSLO | {"days": None}),
        row({"town": 1}, "any", has_tools=False),
        row({"town": 1}, schema=None),
        row({"town": 1}, schema=CITY),
        row({"town": 1}, schema={"properties": CITY, "additionalProperties": {}}),
        row({"town": 1}, schema={"properties": CITY, "required": [["town"], 3]} | {"anyOf": [{}]}),
        row({"city": 1}, schema={"properties": {"city": {"type": ["string", "integer"]}}}),
    ],
)
def test_calls_that_fit_or_may(tmp_path: Path, one: dict[str, Any]) -> None:
    assert found(tmp_path, one) == []


def test_rows_with_such_calls_are_dropped(tmp_path: Path) -> None:
    rows = [row(OSLO), row({"days": 2})]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    cleaner.clean(tmp_path / "rows.jsonl", tmp_path / "clean.jsonl", Cleaning(recommended=True))
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == rows[:1]
