"""Converts a request of the Responses API to one for a chat completion."""

from collections.abc import Mapping
from typing import Any

from tunery.errors import Unsupported
from tunery.field_errors import unrecognized

_KEPT_NOWHERE = "This server stores no responses: send the whole conversation as 'input'."
_REFUSED = {
    "previous_response_id": _KEPT_NOWHERE,
    "conversation": _KEPT_NOWHERE,
    "background": "Leave it out, and read the answer or its stream.",
    "prompt": "Write the prompt into 'instructions' and 'input'.",
    "max_tool_calls": "Leave it out: the client calls the tools.",
}
"""Fields that are refused unless they are null or false, with what to do instead."""
_SAME = ("model", "temperature", "top_p", "stream", "seed", "stop")
_WITHOUT_EFFECT = frozenset(
    {
        "context_management", "include", "metadata", "parallel_tool_calls", "prompt_cache_key",
        "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream_options",
        "truncation", "user",
    }
)  # fmt: skip
_CHANGED = frozenset({"input", "instructions", "max_output_tokens", "text", "tool_choice", "tools", "top_logprobs"})
PARAMS = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
"""The names that a chat completion's fields have in the Responses API."""
_TEXTS = ("input_text", "output_text", "text", "refusal")


def to_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the chat completion's fields. Raises InvalidValue and Unsupported, each naming the field."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name, instead in _REFUSED.items():
        if given.pop(name, False):
            raise Unsupported(param=name, what=f"'{name}'", instead=instead)
    known = _CHANGED | _WITHOUT_EFFECT | set(_SAME)
    for name in given.keys() - known - _REFUSED.keys():
        raise unrecognized(name, known)
    chat = {name: given[name] for name in _SAME if name in given}
    chat["messages"] = _messages(given)
    if "max_output_tokens" in given:
        chat["max_completion_tokens"] = given["max_output_tokens"]
    if tools := given.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    if "tool_choice" in given:
        chat["tool_choice"] = _choice(given["tool_choice"])
    if (text := given.get("text")) and (wanted := text.get("format")):
        chat["response_format"] = _format(wanted)
    if "message.output_text.logprobs" in given.get("include", ()) or given.get("top_logprobs"):
        chat |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    if given.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return chat


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the conversation; calls that follow each other, or an assistant's text, are one message's."""
    made = [{"role": "system", "content": given["instructions"]}] if "instructions" in given else []
    asked = given["input"]
    for place, item in enumerate([{"role": "user", "content": asked}] if isinstance(asked, str) else asked):
        message = _message(item, f"input[{place}]")
        if message is None:
            continue
        if "tool_calls" in message and made and made[-1]["role"] == "assistant":
            made[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            made.append(message)
    return made


def _message(item: Any, param: str) -> dict[str, Any] | None:
    """Returns an item of the input as a message; None for thinking, which is not shown again in prompts."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        return {"role": item.get("role"), "content": _content(item.get("content"), f"{param}.content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = _content(item.get("output"), f"{param}.output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    if kind == "reasoning":
        return None
    raise Unsupported(
        param=f"{param}.type" if isinstance(item, dict) else param,
        what=f"An item of the type '{kind}'",
        instead="Send messages, function_call and function_call_output.",
    )


def _content(content: Any, param: str) -> Any:
    """Returns text content as the parts of a chat message."""
    if not isinstance(content, list):
        return content
    parts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            raise Unsupported(
                param=f"{param}[{place}].type", what=f"Content of the type '{kind}'", instead="Send text."
            )
        parts.append({"type": "text", "text": part.get("text", part.get("refusal"))})
    return parts


def _tool(tool: Any, param: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else None
        raise Unsupported(param=f"{param}.type", what=f"A tool of the type '{kind}'", instead="Use functions.")
    named = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": named}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        what = f"A tool_choice of the type '{choice.get('type')}'"
        raise Unsupported(param="tool_choice", what=what, instead="Use 'required' or a function by name.")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _format(wanted: dict[str, Any]) -> dict[str, Any]:
    if wanted.get("type") != "json_schema":
        return wanted
    schema = {name: value for name, value in wanted.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}
