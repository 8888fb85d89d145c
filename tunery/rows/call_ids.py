"""Gives ids to calls and tool results that have none, as many data sets leave them out."""

from collections import OrderedDict, defaultdict
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
    ids, calls = _unused(), _OpenCalls()
    made = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_with_id(call, ids) for call in message["tool_calls"]]}
            calls.open(message["tool_calls"])
        elif isinstance(message, dict) and message.get("role") == "tool":
            if message.get("tool_call_id") is None:
                message = {**message, "tool_call_id": calls.first(message.get("name")) or next(ids)}
            calls.close(message["tool_call_id"])
        made.append(message)
    return made


class _OpenCalls:
    """The calls without a result so far, in their order; each look-up takes the same time, however many there are."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._of_name: defaultdict[str, OrderedDict[str, None]] = defaultdict(OrderedDict)

    def open(self, calls: list[Any]) -> None:
        for call in calls:
            if isinstance(call, dict) and isinstance(id := call.get("id"), str):
                self._names[id] = name = _name(call)
                self._of_name[name][id] = None

    def close(self, id: Any) -> None:
        if isinstance(id, str) and id in self._names:
            self._of_name[self._names.pop(id)].pop(id, None)

    def first(self, name: Any) -> str | None:
        """Returns the id of the first call of a function, or else the first call; None if none is open."""
        named = self._of_name.get(name) if isinstance(name, str) else None
        return next(iter(named or self._names), None)


def _unused() -> Iterator[str]:
    """Yields ids of nine letters and digits, the only ones that Mistral's templates accept."""
    return (f"call{number:05}" for number in count())


def _with_id(call: Any, ids: Iterator[str]) -> Any:
    return {**call, "id": next(ids)} if isinstance(call, dict) and call.get("id") is None else call


def _name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, dict) else ""
