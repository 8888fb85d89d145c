"""A chat request as the API hands it on: the user's own body and, beside it, the files that `model` stands for.

What this server does not do is refused by name instead of being ignored: an answer that silently lacks its log
probabilities or its JSON schema is worse than none.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunery.errors import InvalidValue, Unsupported
from tunery.rows import keys, reasons, strict_json
from tunery.rows.messages import Message, Tool
from tunery.serving import MODEL_FIELD, Chosen

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
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
"""Fields of OpenAI's that are not served, with the values that ask for nothing (null always does)."""

_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}
"""Fields of OpenAI's that change nothing about the answer."""


class _Sealed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, value: Any) -> Any:
        return keys.present(value)


class StreamOptions(_Sealed):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Sealed):
    """What `POST /v1/chat/completions` understands. Tokens are the model's own; defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1)
    chosen: Chosen = Field(validation_alias=MODEL_FIELD)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="The older name of max_completion_tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token; absent: 1")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: list[str] | None = Field(None, description="Or one string alone")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
    """The request in a body. Raises InvalidValue and Unsupported, each naming the field."""
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
    return f"Leave it out, or send {' or '.join(repr(value) for value in neutral)}." if neutral else "Leave it out."


def _reason(error: ValidationError) -> InvalidValue:
    first = error.errors(include_url=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return InvalidValue(param=param, reason=f"Unrecognized request argument supplied: {param}")
    if first["type"] == "missing":
        return InvalidValue(param=param, reason=f"Missing required parameter: '{param}'.")
    return InvalidValue(param=param, reason=f"Invalid '{param}': {reasons.describe(first)}")
