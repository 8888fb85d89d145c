"""Compares an answer with the wanted one: as text, as JSON, as tool calls and field by field."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_JSON = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder()
_REASONING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)


def matches(wanted: str, answer: str, *, is_call: bool = False) -> bool:
    """Whether an answer is right: equal text, except for whitespace at the ends and the spelling of JSON in it.

    In JSON, the order of keys, whitespace and the spelling of numbers do not matter: 10.0 equals 10. `is_call`: nor do
    the ids of tool calls, which are random.
    """
    return _canonical(wanted, is_call) == _canonical(answer, is_call)


def without_reasoning(text: str) -> str:
    """Returns the answer after a leading think block, without whitespace at the ends."""
    return _REASONING.sub("", text).strip()


def parse_json(text: str) -> Any:
    """Returns the object or array that the whole answer is, after any reasoning; None if it is neither."""
    try:
        value = json.loads(without_reasoning(text), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def without_fence(text: str) -> str:
    """Returns the text inside a code fence around the whole answer; the answer itself if there is none."""
    answer = without_reasoning(text)
    found = _FENCE.match(answer)
    return found[1] if found else answer


def fields(value: Any) -> Counter[tuple[str, str]]:
    """Returns the path and value of every leaf of a JSON value. An empty object or array is a leaf."""
    found: Counter[tuple[str, str]] = Counter()
    waiting = [("", value)]  # why not recursion: a model may nest as deeply as the parser allows
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{path}.{json.dumps(key)}", inner) for key, inner in value.items()]
        elif isinstance(value, list) and value:
            waiting += [(f"{path}[{place}]", inner) for place, inner in enumerate(value)]
        else:
            found[path, json.dumps(_number(value))] += 1
    return found


def calls(text: str) -> list[tuple[str, str]]:
    """Returns the name and the arguments, in canonical form, of every tool call written as JSON in the text."""
    return sorted(call for _, value in _pieces(text) for call in _calls_of(_bare_calls(value)))


def _calls_of(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for item in value:
            yield from _calls_of(item)
    elif isinstance(value, dict) and "function" in value:
        yield from _calls_of(value["function"])
    elif isinstance(value, dict) and value.keys() == {"name", "arguments"}:
        yield str(value["name"]), _spelled(value["arguments"])


def _canonical(text: str, is_call: bool) -> list[str]:
    """Returns the text in pieces, with its JSON objects and arrays in canonical form."""
    pieces: list[str] = []
    for before, value in _pieces(text):
        pieces.append(before.strip())
        if value is not None:
            pieces.append(_spelled(_bare_calls(value) if is_call else value))
    return pieces


def _pieces(text: str) -> Iterator[tuple[str, Any]]:
    """Yields a text's JSON objects and arrays, each with the text before it; then the rest, with None."""
    start = place = 0
    while found := _JSON.search(text, place):
        place = found.start()
        try:
            value, end = _DECODER.raw_decode(text, place)
            _spelled(_bare_calls(value))
        except ValueError:
            place += 1
            continue
        except RecursionError:  # thousands of unclosed brackets: nothing to compare as JSON
            break
        yield text[start:place], value
        start = place = end
    yield text[start:], None


def _spelled(value: Any) -> str:
    """Returns a JSON value in canonical form. Raises RecursionError."""
    return json.dumps(_number(value), sort_keys=True)


def _number(value: Any) -> Any:
    """Returns the value with integers for whole floats at any depth. Raises RecursionError."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {name: _number(item) for name, item in value.items()}
    return value


def _bare_calls(value: Any) -> Any:
    """Returns a JSON value's tool calls without their ids, with arguments as objects. Raises RecursionError."""
    if isinstance(value, list):
        return [_bare_calls(item) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict):
        return {"function": _bare_calls(value["function"])}
    if "name" not in value or not {"arguments", "parameters"} & value.keys():
        return value
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return {"name": value["name"], "arguments": arguments}


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
