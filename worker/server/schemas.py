"""A chat request as the API forwards it: the user's own body, and the files of its `model`.

Fields that this server does not support are refused by name and not ignored: an answer that silently lacks its log
probabilities or its JSON schema is worse than none.
"""

import json
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunery.errors import InvalidValue, Unsupported
from tunery.field_errors import unrecognized
from tunery.rows import keys, reasons, strict_json
from tunery.rows.messages import Message, Tool
from tunery.serving import MODEL_FIELD, TEXT_FIELD, Chosen

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "store": (False,),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that are not supported, with the values that request nothing (null always does)."""

_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}
"""OpenAI's fields that do not change the answer."""

_INTERNAL = {"chosen", "text"}
"""Fields that the API adds to a request."""


def _refuse(param: str, reason: str) -> NoReturn:
    raise InvalidValue(param=param, reason=f"Invalid '{param}': {reason}.")


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        return keys.present(value)


class StreamOptions(_Sealed):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Sealed):
    """A schema that an answer is to keep to, always: `strict` asks for nothing more."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Sealed):
    """What an answer's text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            _refuse("response_format", "'json_schema' goes only with the type 'json_schema'")
        return self


class FunctionName(_Sealed):
    name: str


class NamedTool(_Sealed):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Sealed):
    """What `POST /v1/chat/completions` understands. Tokens are the model's own; defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    messages: list[Message] = []
    text: str | None = Field(None, validation_alias=TEXT_FIELD, description="Text to continue, in place of messages")
    chosen: Chosen = Field(validation_alias=MODEL_FIELD)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token. Absent: 1")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: list[str] | None = Field(None, description="One string or several")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    n: int = Field(1, ge=1, le=128, description="Number of answers; each has its own seed")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.text is None and not self.messages:
            _refuse("messages", "it needs at least one message")
        if self.text is not None and self.messages:
            _refuse(TEXT_FIELD, "it is reserved for the server: omit it")
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", "it needs 'logprobs': true")
        if self.must_call:
            names = [tool.function.name for tool in self.tools or ()]
            if not names:
                _refuse("tool_choice", "it requires a call, but 'tools' is empty")
            if not self.callable_tools:
                _refuse("tool_choice", f"it names a tool that is not in 'tools' ({', '.join(names)})")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools of which one must be called."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool for tool in self.tools or () if named in (None, tool.function.name)]

    def nth(self, index: int) -> "ChatRequest":
        """Returns the request for one of its `n` answers."""
        return self if self.seed is None or index == 0 else self.model_copy(update={"seed": self.seed + index})

    @property
    def stops(self) -> list[str]:
        return [stop for stop in self.stop or () if stop]

    @property
    def offered_tools(self) -> list[Tool] | None:
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse(body: bytes) -> ChatRequest:
    """Returns the request in a body. Raises InvalidValue and Unsupported, each naming the field."""
    try:
        fields = strict_json.load_object(body.decode())
    except ValueError as error:
        raise InvalidValue(reason=f"We could not parse the JSON body of your request: {error}") from None
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] is not None and fields[name] not in neutral:
            raise Unsupported(param=name, what=f"'{name}'", instead=_instead(neutral))
    known = {name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT and not _refused(name)}
    try:
        return ChatRequest.model_validate(known)
    except ValidationError as error:
        raise _reason(error) from None


def _refused(name: str) -> bool:
    return name in _NEUTRAL and name not in ChatRequest.model_fields


def _instead(neutral: tuple[Any, ...]) -> str:
    return (
        f"Leave it out, or send {' or '.join(json.dumps(value) for value in neutral)}." if neutral else "Leave it out."
    )


def _reason(error: ValidationError) -> InvalidValue:
    first = error.errors(include_url=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return unrecognized(param, (ChatRequest.model_fields.keys() | _WITHOUT_EFFECT) - _INTERNAL)
    if first["type"] == "missing":
        return InvalidValue(param=param, reason=f"Missing required parameter: '{param}'.")
    return InvalidValue(param=param, reason=f"Invalid '{param}': {reasons.describe(first)}")
