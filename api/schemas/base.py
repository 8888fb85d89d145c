"""The bases of all requests and answers of the API."""

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

Item = TypeVar("Item")
Shown = TypeVar("Shown", bound=BaseModel)


class ResponseBody(BaseModel):
    """An answer. Its keys leave in the order of the fields, nulls included."""

    model_config = ConfigDict(frozen=True)


class Body(BaseModel):
    """A request's body: unknown fields are refused, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def answer_of(request: type[BaseModel], **descriptions: str) -> type[ResponseBody]:
    """Returns the class of an answer with the fields of `request`, all of them required and none with its bounds.

    Why not the request's own fields: an answer shows what was decided, or accepted by an older release, and a bound
    would turn it into an error.
    """
    fields: dict[str, Any] = {
        name: (field.annotation, Field(description=descriptions.get(name)))
        for name, field in request.model_fields.items()
    }
    return create_model("Answer", __base__=ResponseBody, **fields)


def of_stored(kind: type[Shown], values: dict[str, Any]) -> Shown:
    """Returns the part of an answer that shows what the database has.

    Fields that this release does not know are left out: in an upgrade the workers are replaced first, and store what a
    newer release knows in the rows that an older API still has to show.
    """
    return kind.model_validate(values, extra="ignore")


def seconds(at: datetime) -> int:
    """Unix time, as the dialect has it everywhere."""
    return int(at.timestamp())


def maybe_seconds(at: datetime | None) -> int | None:
    return None if at is None else seconds(at)


class ListOf(ResponseBody, Generic[Item]):
    """A page. `after=<id of its last object>` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False


class CursorList(ResponseBody, Generic[Item]):
    """A page that also names its ends."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False

    @classmethod
    def of(cls, data: list[Item], *, has_more: bool) -> "CursorList[Item]":
        ends = [str(item.id) for item in (data[:1] + data[-1:])]  # type: ignore[attr-defined]  # every object has one
        return cls(data=data, first_id=ends[0] if ends else None, last_id=ends[-1] if ends else None, has_more=has_more)


class WholeList(ResponseBody, Generic[Item]):
    """Everything there is, at once."""

    object: Literal["list"] = "list"
    data: list[Item]


class ErrorBody(ResponseBody):
    message: str = Field(description="What is wrong and what to change")
    type: str
    param: str | None = Field(description="The invalid field of the request, as a dotted path")
    code: str | None = Field(description="A stable code for programs")


class Error(ResponseBody):
    """The body of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "Missing required parameter: 'training_file'.",
                        "type": "invalid_request_error",
                        "param": "training_file",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    error: ErrorBody


class Deleted(ResponseBody):
    """The answer to a deletion; each kind of object says its own `object`."""

    id: str
    object: str
    deleted: Literal[True] = True


Answers = dict[int | str, dict[str, Any]]

_MEANING = {
    400: "The request cannot be processed; the message says what to change",
    401: "No key, or an invalid one",
    403: "The key lacks the permission",
    404: "No such object in the key's project",
    413: "The body or file is too large",
    429: "The project has reached a limit",
    504: "The answer took too long",
    503: "A part of the service is unavailable; try again after `Retry-After` seconds",
}


def errors(*statuses: int) -> Answers:
    """Returns the documentation of a route's errors. Every route may answer 400, 401, 500 and 503."""
    every = sorted({400, 401, 503, *statuses})
    return {status: {"model": Error, "description": _MEANING[status]} for status in every}


def examples() -> dict[str, list[Any]]:
    """Returns every schema's examples by its name, nulls included."""
    found = {}
    waiting: list[type[BaseModel]] = [ResponseBody, Body]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        extra = kind.model_config.get("json_schema_extra")
        if isinstance(extra, dict) and "json_schema_extra" in vars(kind).get("model_config", {}):
            found[kind.__name__] = list(extra["examples"])  # type: ignore[arg-type]  # JSON, a list where we wrote one
    return found
