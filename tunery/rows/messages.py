"""Chat messages and training rows, in OpenAI's format.

Reasons are written by hand instead of taken from the validator: they address the file's author, and existing tools
match OpenAI's wording ("Invalid file format. Example 100, message 2 ...").
"""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tunery.failures import InvalidTrainingFile
from tunery.rows import call_ids, filled, keys, reasons, strict_json
from tunery.rows.formats import SourceRow
from tunery.rows.jsonl import parse
from tunery.rows.pairs import PairShape
from tunery.rows.shape import WRITE_ROWS, TextShape
from tunery.rows.shapes import FileShape

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
FileRole = Literal["training", "validation", "test", "replay"]
_ROLES = {"developer": "system", "function": "tool"}
"""OpenAI's roles by their names in chat templates of open models."""
_PLAIN = {"role", "content"}
"""The fields of nearly every message."""


def refuse(reason: str) -> NoReturn:
    """Raises a validator's error with a reason of this project."""
    # As a field, because pydantic would read braces in the text as placeholders.
    raise PydanticCustomError("refused", "{reason}", {"reason": reason})


class _Sealed(BaseModel):
    """An object with a fixed set of keys. Null means absent; keys that only answers have are ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    passed_over: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        return keys.present(value, cls.passed_over)


class FunctionCall(_Sealed):
    """A function's name and its arguments, a JSON object in a string."""

    passed_over = frozenset({"parsed_arguments"})

    name: str = Field(min_length=1)
    arguments: str = "{}"

    @field_validator("arguments", mode="before")
    @classmethod
    def _spell_object(cls, value: object) -> object:
        """Also accepts the object itself, one encoded as a string twice, and an empty value, which means {}."""
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str):
            return value
        try:
            once = value if value.strip() else "{}"
            inner = strict_json.load_value(once)
            spelled = inner if isinstance(inner, str) else once
            strict_json.load_object(spelled)
        except ValueError as error:
            refuse(f"must be a JSON object written as a string: {error}")
        return spelled

    def for_template(self) -> dict[str, Any]:
        """Returns the call with its arguments as an object, because templates serialise them (`| tojson`)."""
        return {"name": self.name, "arguments": json.loads(self.arguments)}


class ToolCall(_Sealed):
    """One call that an assistant message makes."""

    passed_over = frozenset({"index"})  # streamed calls are numbered

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        call: dict[str, Any] = {"type": "function", "function": self.function.for_template()}
        return call if self.id is None else {"id": self.id, **call}


class Function(_Sealed):
    """A function's description for the model. All keywords of its JSON Schema are passed on."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _decode(cls, value: object) -> object:
        return _decoded_object(None if value == "" else value)

    @field_validator("parameters")
    @classmethod
    def _drop_filled(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else filled.clean_schema(value)


class Tool(_Sealed):
    """One function that a row offers."""

    type: Literal["function"] = "function"
    function: Function

    @field_validator("function", mode="before")
    @classmethod
    def _decode(cls, value: object) -> object:
        return _decoded_object(value)

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class Message(_Sealed):
    """One message of a conversation. Only an assistant message can be learned from: `is_trained`."""

    role: Role
    content: str | None = None
    name: str | None = None
    weight: int | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(None, description="Thinking before the answer, for templates that show it")

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        if type(value) is dict and value.keys() == _PLAIN and None not in value.values():
            return value
        answers = isinstance(value, dict) and value.get("role") == "assistant"
        return keys.present(value, keys.OF_AN_ANSWER if answers else ())

    @field_validator("weight", mode="before")
    @classmethod
    def _is_0_or_1(cls, value: object) -> object:
        if value is not None and (isinstance(value, bool) or value not in (0, 1)):
            refuse(f"must be 0 (not learned from) or 1 (learned from), not {reasons.found(value)}.")
        return value if value is None else int(value)

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        if isinstance(value, list):
            # Joined by newlines, as common inference servers do for templates that expect one string.
            return "\n".join(map(_part_text, value))
        if isinstance(value, str):
            return value
        refuse(f"must be a string or a list of text parts, not {reasons.found(value)}.")

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _decode_calls(cls, value: object) -> object:
        return _decoded(value)

    @field_validator("tool_calls")
    @classmethod
    def _none_when_empty(cls, value: list[ToolCall] | None) -> list[ToolCall] | None:
        return value or None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant" and self.model_fields_set != _PLAIN:
            for field in ("weight", "tool_calls", "function_call", "refusal", "reasoning_content"):
                if getattr(self, field) is not None and not (field == "weight" and self.weight == 0):
                    refuse(f"has '{field}', which only an assistant message can have. Remove it or correct the role.")
        if self.role == "tool" and self.tool_call_id is None:
            refuse("is a tool result without 'tool_call_id'. Add the id of the call that it answers.")
        if self.content is None and not (self.tool_calls or self.function_call or self.refusal):
            refuse("has no 'content'. Give it a text" + (" or tool_calls." if self.role == "assistant" else "."))
        return self

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    @property
    def is_silent(self) -> bool:
        """Whether the message is empty: no text, no thinking, no call."""
        calls = self.tool_calls or self.function_call
        return not (_says(self.content) or calls or _says(self.refusal) or _says(self.reasoning_content))

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates of open models expect it: no developer role, legacy calls or nulls.

        Except `content`, which is null beside tool calls, because templates test `content is none`.
        """
        role = _ROLES.get(self.role, self.role)
        if self.model_fields_set == _PLAIN:
            return {"role": role, "content": self.content}
        calls = [call.for_template() for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append({"type": "function", "function": self.function_call.for_template()})
        content = self.content or self.refusal if self.refusal else self.content
        thoughts = self.reasoning_content
        fields = {
            "role": role,
            "content": content,
            "refusal": self.refusal if content != self.refusal else None,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
            "reasoning_content": thoughts,
            "thinking": thoughts,
        }
        return {key: value for key, value in fields.items() if value is not None or key == "content"}


def _says(text: str | None) -> bool:
    return bool(text and not text.isspace())


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    fields = keys.present(part, ("annotations", "cache_control"))
    if not isinstance(fields, dict) or not isinstance(kind := fields.pop("type", None), str):
        refuse('has a part without a type. A text part is {"type": "text", "text": "..."}.')
    if kind not in ("text", "refusal"):
        refuse(
            f"has a part of type '{kind[:40]}'. Only text is supported here: remove the part, or describe it in words."
        )
    text = fields.pop(kind, None)
    if not isinstance(text, str):
        refuse(f"has a {kind} part without '{kind}'.")
    if fields:
        refuse(f"has a {kind} part with the unknown key '{next(iter(fields))}'. Remove it.")
    return text


def _decoded(value: object) -> object:
    """Returns the value of a JSON string, as tables store lists; any other value unchanged."""
    return _load(value, strict_json.load_value, "a list", "a JSON list")


def _decoded_object(value: object) -> object:
    """Returns the object of a JSON string; any other value unchanged."""
    return _load(value, strict_json.load_object, "an object", "a JSON object")


def _load(value: object, load: Callable[[str], object], kind: str, written: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return load(value)
    except ValueError as error:
        refuse(f"must be {kind}, or {written} written as a string: {error}")


def _wrapped(tool: Any) -> Any:
    """Returns a tool in the form of requests, also for a bare function and for a JSON string."""
    if isinstance(tool, str):
        with suppress(ValueError):  # the caller says that it is no object
            tool = strict_json.load_object(tool)
    if not isinstance(tool, dict) or "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def read_functions(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a row's fields with `tools` in place of `functions`."""
    functions = _decoded(fields.pop("functions", None))
    if not functions:
        return fields
    if fields.get("tools"):
        refuse("has both 'tools' and its older name 'functions'. Keep 'tools'.")
    if not isinstance(functions, list):
        refuse(f"'functions' must be a list, not {reasons.found(functions)}.")
    return {**fields, "tools": [{"type": "function", "function": item} for item in functions]}


class Example(BaseModel):
    """One training row. Unknown keys (an id, a source) are kept in `model_extra` and not trained on."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="before")
    @classmethod
    def _read_row(cls, row: Any) -> Any:
        fields = keys.present(row)
        if not isinstance(fields, dict):
            return fields
        if reason := keys.find_meaning(fields):
            refuse(reason)
        return filled.clean_calls(read_functions(fields))

    @field_validator("messages", mode="before")
    @classmethod
    def _decode_messages(cls, value: object) -> object:
        messages: Any = _decoded(value)
        if isinstance(messages, list) and messages and isinstance(messages[0], list):
            refuse(f"is a list of conversations. {WRITE_ROWS}")
        return call_ids.fill(messages) if call_ids.lacks_ids(messages) else messages

    @field_validator("tools", mode="before")
    @classmethod
    def _decode_tools(cls, value: object) -> object:
        tools = _decoded(value or None)
        return list(map(_wrapped, tools)) if isinstance(tools, list) else tools

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> "Example":
        if any(message.is_trained for message in self.messages):
            return self
        if not any(message.role == "assistant" for message in self.messages):
            refuse("has no assistant message, so there is nothing to learn from. Add the answer you want.")
        refuse(
            "gives every assistant message the weight 0, so there is nothing to learn from. Give at least one the "
            "weight 1."
        )

    @property
    def unknown_keys(self) -> list[str]:
        """Keys of the row that are not read, except `id`, which is only the row's name."""
        return [key for key in self.model_extra or () if key != "id"]


class PlainText(Example):
    """A row of plain text: one message, all tokens of which are learned."""


def is_answerable(example: Example) -> bool:
    """Whether a model can be asked for the row's last message."""
    return example.messages[-1].role == "assistant" and not isinstance(example, PlainText)


def parse_line(text: str, line_number: int, role: FileRole = "training") -> Example:
    """Parses one line of JSON Lines. Raises InvalidTrainingFile, naming line and message (from 1)."""
    return parse_row(parse(SourceRow(line_number, None, text=text)), role)


def parse_row(source: SourceRow, role: FileRole = "training") -> Example:
    """Parses one row of a file, whose shape its first row decides. Raises InvalidTrainingFile, naming row and message
    (from 1)."""
    shape = source.shape or FileShape()
    try:
        fields = shape.convert(source)
        if isinstance(shape.shape, PairShape):
            raise ValueError(keys.PREFERENCE)  # noqa: TRY004 (to callers every fault of a row is one kind)
        is_plain = isinstance(shape.shape, TextShape)
        if is_plain and role == "test":
            raise ValueError("is plain text, but a test row needs a question and the expected answer. Add both.")
        example = (PlainText if is_plain else Example).model_validate(fields)
    except ValidationError as error:
        where, reason = reasons.locate(error.errors()[0])
        raise invalid(role, source.name, reason, where) from None
    except ValueError as error:
        raise invalid(role, source.name, str(error)) from None
    if role == "test" and example.messages[-1].role != "assistant":
        reason = "does not end with an assistant message, the expected answer. Add it."
        raise invalid(role, source.name, reason, "")
    return example


def invalid(role: FileRole, name: str, reason: str, where: str = ":") -> InvalidTrainingFile:
    """Returns the error for a row of a job's `role` file. `name`: see `SourceRow`; `where` follows it."""
    return InvalidTrainingFile(
        param=f"{role}_file", role=role, reason=f"Invalid file format. {name.capitalize()}{where} {reason}"
    )
