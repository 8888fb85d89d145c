"""Gives ids to calls and tool results that have none, as many data sets leave them out."""

from collections.abc import Iterator
from itertools import count
from typing import Any


def lacks_ids(messages: Any) -> bool:
    """Whether a tool result does not say which call it answers."""
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "tool" and message.get("tool_call_id") is None
        for message in messages
    )


def fill(messages: list[Any]) -> list[Any]:
    """Returns messages in which every call and every tool result has an id. A result without one answers the first open
    call of the function that it names, or else the first open call."""
    ids, open_calls = _unused(), dict[str, Any]()
    made = []
    for message in messages:
        if isinstance(message, dict) and isinstance(calls := message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_with_id(call, ids) for call in calls]}
            open_calls |= {call["id"]: _name(call) for call in message["tool_calls"] if _has_id(call)}
        elif isinstance(message, dict) and message.get("role") == "tool":
            if message.get("tool_call_id") is None:
                message = {**message, "tool_call_id": _answered(message, open_calls) or next(ids)}
            open_calls = {id: name for id, name in open_calls.items() if id != message["tool_call_id"]}
        made.append(message)
    return made


def _unused() -> Iterator[str]:
    """Yields ids of nine letters and digits, the only ones that Mistral's templates accept."""
    return (f"call{number:05}" for number in count())


def _has_id(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("id"), str)


def _with_id(call: Any, ids: Iterator[str]) -> Any:
    return {**call, "id": next(ids)} if isinstance(call, dict) and call.get("id") is None else call


def _name(call: dict[str, Any]) -> Any:
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _answered(result: dict[str, Any], open_calls: dict[str, Any]) -> str | None:
    """Returns the id of the call that a result answers; None if no call is open."""
    named = (id for id, name in open_calls.items() if name == result.get("name"))
    return next(named, next(iter(open_calls), None))
