"""Checks that a template shows every field of a conversation, by rendering a sentinel in each.

A template drops what it does not support: tool calls, a tool's result, a system message in the middle, thinking. A
model would then learn answers to information that its prompt lacks. So for each shape (roles, fields, number of calls)
a conversation is rendered once with a distinct text in each field, and all texts must appear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.rows.dialect import LimitExceeded
from tunery.rows.errors import CannotRender

Json = dict[str, Any]
Render = Callable[[list[Json], list[Json] | None, bool], str]
"""Renders messages and tools, with or without the generation prompt. Raises CannotRender."""

_MOST_SHAPES = 4096
_EMPTY_FORMS: tuple[Callable[[str | None], str | None], ...] = (lambda given: given, lambda _: "", lambda _: None)
"""Forms of empty content beside tool calls, in the order tried: as in the row, "", null. Some templates recognise a
call by null, others fail on it."""

_WITHOUT_TOOLS = "Use a model whose template supports tools, or write calls and results as plain content."
_ADVICE = {
    "tools": _WITHOUT_TOOLS,
    "tool calls": _WITHOUT_TOOLS,
    "tool results": _WITHOUT_TOOLS,
    "content beside tool calls": "Remove the content of that message, or use a model whose template shows both.",
    "a system message there": "Move its text into the first message or into a user message.",
    "that message": "Remove the message, or use a model whose template shows it.",
    "names": "Remove the name, or write it into the content.",
    "thinking": "Remove it, write it into the content, or use a model whose template shows thinking.",
    "a refusal beside content": "Give the message either content or a refusal.",
}


@dataclass(frozen=True)
class _Field:
    sentinel: str
    subject: str
    """A key of `_ADVICE`."""
    place: str
    message: int = -1


@dataclass(frozen=True)
class _Verdict:
    form: int = 0
    """Index into `_EMPTY_FORMS`."""
    reason: str | None = None


class FieldCheck:
    """Refuses conversations of which a template drops a part. Caches the verdict of each shape."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._verdicts: dict[Any, _Verdict] = {}

    def in_shown_form(self, messages: list[Json], tools: list[Json] | None, prompting: bool) -> list[Json]:
        """Returns the messages, with empty content beside tool calls in a form with which the template shows the calls.

        Raises CannotRender, naming the field, if the template would drop one.
        """
        shape = (prompting, tuple(_shape(messages, index) for index in range(len(messages))), _shape_of_tools(tools))
        verdict = self._verdicts.get(shape)
        if verdict is None:
            verdict = self._try(messages, tools, prompting)
            if len(self._verdicts) >= _MOST_SHAPES:
                self._verdicts.clear()
            # An error may be temporary, such as a process killed for its memory, and is not cached.
            self._verdicts[shape] = verdict
        if verdict.reason is not None:
            raise CannotRender(reason=verdict.reason)
        return _in_form(messages, verdict.form) if verdict.form else messages

    def _try(self, messages: list[Json], tools: list[Json] | None, prompting: bool) -> _Verdict:
        refused: CannotRender | None = None
        lost: list[_Field] = []
        complete: dict[int, int] = {}
        for form in range(len(_EMPTY_FORMS) if any(map(_is_bare_call, messages)) else 1):
            marked = _Marked(_in_form(messages, form), tools)
            try:
                text = self._render(marked.messages, marked.tools, prompting).lower()
                missing = self._losses(marked, text)
            except CannotRender as error:
                if isinstance(error.__cause__, LimitExceeded):
                    raise  # another form would be as expensive
                # The error for the empty text is more to the point than that for null.
                refused = error if refused is None or form == 1 else refused
                continue
            lost = lost or missing
            if not missing:
                complete[form] = text.count("none")
        if complete:
            # Jinja renders null as "None", which a model must not learn.
            return _Verdict(min(complete, key=complete.__getitem__))
        if lost:
            return _Verdict(reason=_loss(lost))
        assert refused is not None
        raise refused

    def _losses(self, marked: "_Marked", text: str) -> list[_Field]:
        missing = [item for item in marked.fields if item.sentinel not in text]
        return [item for item in missing if not (item.subject == "thinking" and self._shows_at_end(marked, item))]

    def _shows_at_end(self, marked: "_Marked", item: _Field) -> bool:
        # Some templates show thinking only in the last turn; it is then learned in a row that ends there.
        ending_there = marked.messages[: item.message + 1]
        return item.sentinel in self._render(ending_there, marked.tools, False).lower()


@dataclass
class _Marked:
    """A conversation with a distinct sentinel in every field that a template must show: `fields`."""

    messages: list[Json]
    tools: list[Json] | None
    fields: list[_Field] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tools = self.tools and [self._tool(tool, number) for number, tool in enumerate(self.tools)]
        given, self.messages = self.messages, []
        for index in range(len(given)):
            self.messages.append(self._message(given, index))

    def _new(self, subject: str, place: str, message: int = -1) -> str:
        sentinel = f"zq{len(self.fields)}qz"
        self.fields.append(_Field(sentinel, subject, place, message))
        return sentinel

    def _message(self, given: Sequence[Json], index: int) -> Json:
        made = dict(given[index])
        if _is_text(made.get("content")):
            made["content"] = self._new(_subject_of_content(made), "content", index)
        if "reasoning_content" in made:
            made["reasoning_content"] = made["thinking"] = self._new("thinking", "reasoning_content", index)
        if "refusal" in made:
            made["refusal"] = self._new("a refusal beside content", "refusal", index)
        if "tool_calls" in made:
            made["tool_calls"] = [self._call(call, index, number) for number, call in enumerate(made["tool_calls"])]
        if "tool_call_id" in made:
            made["tool_call_id"] = self._id(made["tool_call_id"])
        if "name" in made:
            answered = _answered_name(given, index)
            same = answered is not None and answered == made["name"]
            made["name"] = _answered_name([*self.messages, made], index) if same else self._new("names", "name", index)
        return made

    def _call(self, call: Json, index: int, number: int) -> Json:
        place = f"tool_calls[{number}].function"
        function = {
            "name": self._new("tool calls", f"{place}.name", index),
            "arguments": self._arguments(call["function"]["arguments"], f"{place}.arguments", index),
        }
        made = {**call, "function": function}
        return {**made, "id": self._id(call["id"])} if "id" in call else made

    def _arguments(self, value: Any, place: str, index: int) -> Any:
        if isinstance(value, dict):
            return {
                self._new("tool calls", place, index): self._arguments(item, place, index) for item in value.values()
            }
        if isinstance(value, list):
            return [self._arguments(item, place, index) for item in value[:1]]
        if isinstance(value, bool) or value is None or value == "":
            return value
        if isinstance(value, str):
            return self._new("tool calls", place, index)
        number = 90_000_071 + 1_000 * len(self.fields)
        self.fields.append(_Field(str(number), "tool calls", place, index))
        return number

    def _tool(self, tool: Json, number: int) -> Json:
        place = f"tools[{number}].function"
        function = dict(tool["function"])
        for name in ("name", "description"):
            if _is_text(function.get(name)):
                function[name] = self._new("tools", f"{place}.{name}")
        if "parameters" in function:
            function["parameters"] = self._parameters(function["parameters"], f"{place}.parameters")
        return {**tool, "function": function}

    def _parameters(self, schema: Json, place: str) -> Json:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return schema
        names = {name: self._new("tools", place) for name in properties}
        made = {names[name]: self._property(item, place) for name, item in properties.items()}
        required = schema.get("required")
        listed = [names.get(name, name) for name in required] if isinstance(required, list) else required
        return {**schema, "properties": made} | ({"required": listed} if "required" in schema else {})

    def _property(self, schema: Any, place: str) -> Any:
        if isinstance(schema, dict) and _is_text(schema.get("description")):
            return {**schema, "description": self._new("tools", place)}
        return schema

    def _id(self, given: str) -> str:
        # Nine characters, as Mistral's templates require.
        return self.ids.setdefault(given, f"c{len(self.ids):08d}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not (not value or value.isspace())


def _is_bare_call(message: Json) -> bool:
    return "tool_calls" in message and not message.get("content")


def _in_form(messages: list[Json], form: int) -> list[Json]:
    write = _EMPTY_FORMS[form]
    return [
        {**message, "content": write(message["content"])} if _is_bare_call(message) else message for message in messages
    ]


def _subject_of_content(message: Json) -> str:
    if "tool_calls" in message:
        return "content beside tool calls"
    return {"tool": "tool results", "system": "a system message there"}.get(message["role"], "that message")


def _answered_name(messages: Sequence[Json], index: int) -> str | None:
    """Returns the function that message `index` answers: by the call's id, else the nearest call."""
    wanted = messages[index].get("tool_call_id")
    for message in reversed(messages[:index]):
        for call in message.get("tool_calls", ()):
            if wanted is None or call.get("id") in (None, wanted):
                return str(call["function"]["name"])
    return None


def _loss(lost: list[_Field]) -> str:
    first: dict[str, _Field] = {}
    for item in lost:
        first.setdefault(item.subject, item)
    places = [
        f"'{item.place}'" + (f" of message {item.message + 1}" if item.message >= 0 else "") for item in first.values()
    ]
    return (
        f"The model's chat template does not render {' or '.join(first)}, so {' and '.join(places)} would be lost. "
        f"{_ADVICE[lost[0].subject]}"
    )


def _shape(messages: list[Json], index: int) -> Any:
    """Returns what determines how a template renders a message, apart from its texts."""
    message = messages[index]
    content = message.get("content")
    kind = 2 if _is_text(content) else content
    if len(message) == 2:
        return message["role"], kind
    calls = message.get("tool_calls", ())
    return (
        message["role"],
        kind,
        frozenset(message),
        tuple(("id" in call, _shape_of_value(call["function"]["arguments"])) for call in calls),
        "name" in message and message["name"] == _answered_name(messages, index),
    )


def _shape_of_value(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(map(_shape_of_value, value.values()))
    if isinstance(value, list):
        return "list", *map(_shape_of_value, value[:1])
    if isinstance(value, bool) or value is None or value == "":
        return str(value)
    return type(value)


def _shape_of_tools(tools: list[Json] | None) -> Any:
    return tuple(_shape_of_tool(tool["function"]) for tool in tools or ())


def _shape_of_tool(function: Json) -> Any:
    properties = (function.get("parameters") or {}).get("properties")
    described = _is_text(function.get("description"))
    if not isinstance(properties, dict):
        return described, "parameters" in function
    return described, tuple(
        (str(item.get("type")), _is_text(item.get("description"))) if isinstance(item, dict) else None
        for item in properties.values()
    )
