"""Chat messages and training rows, in OpenAI's spelling.

Hand-written reasons instead of a validator's: whoever reads them made the file, not the program, and existing tools
match on OpenAI's words ("Invalid file format. Example 100, message 2 ...").
"""

import json
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tunery.errors import InvalidTrainingFile
from tunery.rows import strict_json
from tunery.rows.jsonl import load_row

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
FileRole = Literal["training", "validation", "test"]


def _refuse(reason: str) -> NoReturn:
    # Braces would be taken for placeholders of the error's own template, so the text travels as a field.
    raise PydanticCustomError("refused", "{reason}", {"reason": reason})


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FunctionCall(_Sealed):
    """A function's name and its arguments, which are a JSON object spelled as a string."""

    name: str = Field(min_length=1)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str) -> str:
        try:
            strict_json.load_object(value)
        except ValueError as error:
            _refuse(f"must be a JSON object spelled as a string: {error}")
        return value

    def for_template(self) -> dict[str, Any]:
        """Templates of open models write the arguments themselves (`| tojson`), so they get the object."""
        return {"name": self.name, "arguments": json.loads(self.arguments)}


class ToolCall(_Sealed):
    """One call that an assistant message makes."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        call: dict[str, Any] = {"type": "function", "function": self.function.for_template()}
        return call if self.id is None else {"id": self.id, **call}


class Function(BaseModel):
    """What the model is told about a function. JSON Schema has many keywords, and all are the model's to read."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Sealed):
    """One function that a row offers."""

    type: Literal["function"] = "function"
    function: Function

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

    @field_validator("weight", mode="before")
    @classmethod
    def _is_0_or_1(cls, value: object) -> object:
        if value is not None and (isinstance(value, bool) or value not in (0, 1)):
            _refuse(f"must be 0 (not learned from) or 1 (learned from), not {json.dumps(value)}.")
        return value if value is None else int(value)

    @field_validator("content", mode="before")
    @classmethod
    def _joins_text_parts(cls, value: object) -> object:
        return "\n".join(_part_text(part) for part in value) if isinstance(value, list) else value

    @field_validator("tool_calls")
    @classmethod
    def _none_when_empty(cls, value: list[ToolCall] | None) -> list[ToolCall] | None:
        return value or None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant":
            for field in ("weight", "tool_calls", "function_call", "refusal", "reasoning_content"):
                if getattr(self, field) is not None:
                    _refuse(f"has '{field}', which only an assistant message can have. Remove it or mend the role.")
        if self.role == "tool" and self.tool_call_id is None:
            _refuse("is a tool's answer without 'tool_call_id'. Give the id of the call that it answers.")
        if self.content is None and not (self.tool_calls or self.function_call or self.refusal):
            _refuse("has no 'content'. Give it a text" + (" or tool_calls." if self.role == "assistant" else "."))
        return self

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    @property
    def is_silent(self) -> bool:
        """Whether it says nothing at all: no text, no thinking, no call."""
        texts = (self.content, self.refusal, self.reasoning_content)
        return not (self.tool_calls or self.function_call or any(text and text.strip() for text in texts))

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates of open models expect it: no developer, no legacy calls, no nulls."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        calls = [call.for_template() for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append({"type": "function", "function": self.function_call.for_template()})
        thoughts = self.reasoning_content
        fields = {
            "role": role,
            "content": self.refusal if self.content is None else self.content,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
            "reasoning_content": thoughts,
            "thinking": thoughts,
        }
        return {key: value for key, value in fields.items() if value is not None}


def _part_text(part: object) -> str:
    # Joined with newlines: so do the common inference servers for templates that want one string.
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
        _refuse('has a part without a type. A text part is {"type": "text", "text": "..."}.')
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            _refuse(f"has a {kind} part without '{kind}'.")
        return text
    _refuse(f"has a part of type '{kind}'. Only text is supported here: remove the part, or describe it in words.")


class Example(BaseModel):
    """One training row. Unknown keys (an id, a source) are allowed and ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="before")
    @classmethod
    def _functions_are_tools(cls, row: Any) -> Any:
        if isinstance(row, dict) and isinstance(row.get("functions"), list) and not row.get("tools"):
            return {**row, "tools": [{"type": "function", "function": item} for item in row["functions"]]}
        return row

    @model_validator(mode="after")
    def _has_something_to_learn(self) -> "Example":
        if not any(message.role == "assistant" for message in self.messages):
            _refuse("has no assistant message, so there is nothing to learn from. Add the answer you want.")
        if not any(message.is_trained for message in self.messages):
            _refuse("gives every assistant message the weight 0, so there is nothing to learn from. Give one weight 1.")
        return self


def parse_line(text: str, line_number: int, role: FileRole = "training") -> Example:
    """One line of a training file. Raises InvalidTrainingFile, its reason naming line and message (from 1)."""
    try:
        row = load_row(text)
        if row.get("messages") is None:
            raise ValueError(_other_format(row))
        example = Example.model_validate(row)
    except ValidationError as error:
        where, reason = _place(error.errors()[0])
        raise invalid(role, line_number, reason, where) from None
    except ValueError as error:
        raise invalid(role, line_number, str(error)) from None
    if role == "test" and example.messages[-1].role != "assistant":
        reason = "does not end with an assistant message, which is the wanted answer. Add it."
        raise invalid(role, line_number, reason, "")
    return example


def invalid(role: FileRole, line_number: int, reason: str, where: str = ":") -> InvalidTrainingFile:
    """The failure of a job whose `role` file has a fault in one line; `where` follows the line's number."""
    return InvalidTrainingFile(
        param=f"{role}_file", role=role, reason=f"Invalid file format. Example {line_number}{where} {reason}"
    )


def _place(error: ErrorDetails) -> tuple[str, str]:
    """Where in the row, and what is wrong: (", message 2", "Discriminator 'role' is missing in value. ...")."""
    steps = list(error["loc"])
    where = ""
    while len(steps) > 1 and isinstance(steps[1], int):
        where += f", {str(steps[0]).removesuffix('s')} {steps[1] + 1}"
        steps = steps[2:]
    field = ".".join(str(step) for step in steps)
    if field == "role" and where:
        return where, _ROLE_MISSING if error["type"] == "missing" else _unknown_role(error["input"])
    if error["type"] == "missing":
        return where, f"has no '{field}'."
    if error["type"] == "extra_forbidden":
        return where, f"has the unknown key '{field}'. Remove it."
    if error["type"] == "refused":
        return where, f"'{field}' {error['msg']}" if field and not error["msg"].startswith("has") else error["msg"]
    return where, f"'{field}': {error['msg']}." if field else f"{error['msg']}."


_ROLES = "system, developer, user, assistant or tool"
_ROLE_MISSING = f"Discriminator 'role' is missing in value. Give the message a role: {_ROLES}."


def _unknown_role(role: object) -> str:
    return f"has the unknown role {json.dumps(role, ensure_ascii=False)[:60]}. Use {_ROLES}."


def _other_format(row: dict[str, Any]) -> str:
    if "prompt" in row and "completion" in row:
        return (
            "Unexpected file format, expected chat messages: prompt/completion pairs are not supported. Write each as "
            '{"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]}.'
        )
    if "input" in row and any(key.startswith(("preferred_", "non_preferred_")) for key in row):
        return (
            "Unexpected file format: this is a preference row (DPO), and only the method 'supervised' is supported. "
            "Send chat rows with 'messages', for instance the preferred answers."
        )
    return "Unexpected file format, expected chat messages: the key 'messages' is missing."
