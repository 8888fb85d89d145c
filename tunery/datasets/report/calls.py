"""Says whether a row's tool calls fit the tools that it offers, and whether every result answers a call."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunery.rows.messages import Example, Function, FunctionCall, Message

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip
_OPEN = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref")
"""Keywords of a schema that may allow other arguments than its properties."""
_SHOWN = 120
"""Characters of the names that are shown."""


def describe(example: Example) -> str | None:
    """Returns what is wrong with the calls of a row and their results. Without tools, none is known to be wrong."""
    offered = {tool.function.name: tool.function for tool in example.tools or ()}
    calls = (call for message in example.messages for call in of_message(message)) if offered else ()
    return next(filter(None, (_misfit(call, offered) for call in calls)), None) or _stray_result(example.messages)


def of_message(message: Message) -> list[FunctionCall]:
    """Returns the calls of a message, also one in the older form."""
    return [*(call.function for call in message.tool_calls or ()), *filter(None, [message.function_call])]


def _misfit(call: FunctionCall, offered: Mapping[str, Function]) -> str | None:
    if (function := offered.get(call.name)) is None:
        return f"Calls '{call.name}', but its tools are {_listed(offered)}."
    schema, given = function.parameters or {}, json.loads(call.arguments)
    required, known = schema.get("required"), schema.get("properties")
    needed = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    if missing := [name for name in needed if name not in given]:
        return f"Calls '{call.name}' without {_listed(missing)}, which it requires."
    if not isinstance(known, dict) or not known:
        return None
    strange = [name for name in given if name not in known]
    if strange and not any(schema.get(keyword, False) is not False for keyword in _OPEN):
        return f"Calls '{call.name}' with {_listed(strange)}, but its arguments are {_listed(known)}."
    wrong = ((name, kind) for name, value in given.items() if (kind := _other_type(value, known.get(name))))
    return next((f"Calls '{call.name}' with a '{name}' that is not of the type {kind}." for name, kind in wrong), None)


def _other_type(value: Any, schema: Any) -> str | None:
    """Returns the type that an argument should have, if it has another one; null counts as absent."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    expected = _TYPES.get(kind) if isinstance(kind, str) else None
    if expected is None or value is None:
        return None
    is_whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    is_other = not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool)
    return kind if is_other and not is_whole else None


def _stray_result(messages: Sequence[Message]) -> str | None:
    known: set[str | None] = set()
    for message in messages:
        known |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and known and message.tool_call_id not in known:
            return f"Has a tool result for the call '{message.tool_call_id}', which no message before it makes."
    return None


def _listed(names: Iterable[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
