"""Comparisons of an answer with the wanted one."""

import json
import re
from contextlib import suppress
from typing import Any

_JSON = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder()


def matches(wanted: str, answer: str, *, is_call: bool = False) -> bool:
    """Whether an answer is right: equal text, but for blanks at the ends and the spelling of JSON in it.

    The order of keys and blanks in JSON do not matter. `is_call`: nor do the ids of tool calls, which nobody can guess.
    """
    return _canonical(wanted, is_call) == _canonical(answer, is_call)


def _canonical(text: str, is_call: bool) -> list[str]:
    """The text in pieces, its JSON objects and arrays in one spelling."""
    pieces, start, place = [], 0, 0
    while found := _JSON.search(text, place):
        place = found.start()
        try:
            value, end = _DECODER.raw_decode(text, place)
        except ValueError:
            place += 1
            continue
        except RecursionError:  # brackets without an end, thousands of them: nothing to compare as JSON
            break
        value = _bare_calls(value) if is_call else value
        pieces += [text[start:place].strip(), json.dumps(value, sort_keys=True)]
        start = place = end
    return [*pieces, text[start:].strip()]


def _bare_calls(value: Any) -> Any:
    """Tool calls in a JSON value without their ids, their arguments as objects."""
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
