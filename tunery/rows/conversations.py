"""Converts conversations from ShareGPT's format: from/value for role/content, other role names, calls as turns."""

import json
from typing import Any

from tunery.rows import call_ids, strict_json

ROLES = {
    **dict.fromkeys(("human", "user", "question"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "bing", "bard", "model", "ai"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""The role of each speaker's name. `call` is an assistant's turn that calls functions; `function` is a message role in
OpenAI's older format, and a tool here if it has no name."""

_CALL = 'must be a call: {"name": "...", "arguments": {...}}, or a list of them.'


def is_sharegpt(messages: Any) -> bool:
    """Whether a list of messages names its speakers as ShareGPT does."""
    try:
        turns = decoded(messages, "messages")
    except ValueError:
        return False
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "role" not in first and "from" in first


def convert(value: Any, key: str) -> Any:
    """Returns the messages of a conversation in OpenAI's format. Raises ValueError, naming the message, from 1."""
    turns = decoded(value, key)
    if not isinstance(turns, list):
        raise ValueError(f"'{key}' must be a list of messages, not {strict_json.kind(turns)}.")  # noqa: TRY004 (as below)
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.extend(_exchange(turn) if _is_exchange(turn) else [_message(turn)])
        except ValueError as error:
            raise ValueError(f"message {number} of '{key}' {error}") from None
    return call_ids.fill(messages)


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, dict) and "input" in turn and turn.keys() <= {"system", "input", "output"}


def _exchange(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a question with its answer. Of a conversation in several, the first has the system's."""
    parts = (("system", turn.get("system")), ("user", turn["input"]), ("assistant", turn.get("output")))
    return [{"role": role, "content": text} for role, text in parts if text or role == "user"]


def decoded(value: Any, key: str) -> Any:
    """Returns the value of a JSON string, as tables store lists; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json.load_value(value)
    except ValueError as error:
        raise ValueError(f"'{key}' must be a list, or a JSON list written as a string: {error}") from None


def _message(turn: Any) -> dict[str, Any]:
    """Converts one turn."""
    if not isinstance(turn, dict):
        raise ValueError(f"must be an object, not {strict_json.kind(turn)}.")  # noqa: TRY004 (as below)
    fields = dict(turn)
    speaker = fields.pop("from", None) or fields.pop("role", None)
    role = _role(speaker, fields)
    if "content" not in fields and "value" in fields:
        fields["content"] = _said(fields.pop("value"), role)
    if role == "call":
        return {**fields, "role": "assistant", **_calls(fields.pop("content", None))}
    return {"role": role, **fields}


def _said(value: Any, role: str) -> Any:
    """Returns a turn's content. The result of a call may be any value, which is written as JSON."""
    is_text = value is None or isinstance(value, str) or _are_parts(value)
    if is_text or role == "call":
        return value
    if role in ("tool", "function"):
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"must have a text in 'value', not {strict_json.kind(value)}.")


def _are_parts(value: Any) -> bool:
    """Whether the value is a list of OpenAI's parts of a content."""
    return isinstance(value, list) and all(isinstance(item, dict) and "type" in item for item in value)


def _role(speaker: Any, fields: dict[str, Any]) -> str:
    if not isinstance(speaker, str):
        raise ValueError("has no speaker. Set 'from' to human, gpt, system, function_call or observation.")  # noqa: TRY004 (as below)
    if speaker == "function":
        return "function" if "name" in fields else "tool"
    if speaker.casefold() not in ROLES:
        raise ValueError(
            f"has the unknown speaker '{speaker[:40]}'. Use human, gpt, system, function_call, observation or tool."
        )
    return ROLES[speaker.casefold()]


def _calls(value: Any) -> dict[str, Any]:
    """Returns the calls of one turn, which are an object or a list of them."""
    items = decoded(value, "function_call")
    made = []
    for item in items if isinstance(items, list) else [items]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ValueError(_CALL)  # noqa: TRY004 (to callers every fault of a row is one kind)
        arguments = item.get("arguments", item.get("parameters", {}))
        spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        made.append({"type": "function", "function": {"name": item["name"], "arguments": spelled}})
    return {"content": None, "tool_calls": made}
