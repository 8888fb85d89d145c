"""The Responses API, stateless: a response is a chat completion in another dialect."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from api import model_server
from api.dependencies import ANY_KEY, StreamCallerDep
from api.json_route import LongJsonRoute
from api.model_server import EventStream
from api.request_errors import RouteNotFound
from api.responses import asked, response
from api.schemas.base import errors

router = APIRouter(prefix="/v1", tags=["Chat"], route_class=LongJsonRoute)


_ANSWER = {
    "id": "resp_abc123",
    "object": "response",
    "created_at": 1721764800,
    "status": "completed",
    "model": "SmolLM2-135M-Instruct",
    "output": [
        {
            "id": "msg_abc123",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Paris.", "annotations": [], "logprobs": []}],
        }
    ],
    "store": False,
    "usage": {"input_tokens": 14, "output_tokens": 3, "total_tokens": 17},
}
_EVENT = 'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "Par"}\n\n'


class TextSettings(BaseModel):
    """What the answer's text is to be; what else is said of it has no effect."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None


class ResponseRequest(BaseModel):
    """What the API itself must know; the other fields are those of OpenAI's Responses API."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"model": "SmolLM2-135M-Instruct", "input": "What is the capital of France?", "store": False}]
        },
    )

    model: str = Field(min_length=1, description="A base or fine-tuned model: id, alias or the base's hub id")
    input: str | list[Any] = Field(description="A text, or messages, calls and their results")
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="Functions")
    tool_choice: str | dict[str, Any] | None = None
    text: TextSettings | None = None
    include: list[str] | None = None


@router.post(
    "/responses",
    summary="Create a response",
    response_class=Response,
    responses=errors(404, 429, 504)
    | {
        200: {
            "description": "The response, or with `stream` its events",
            "content": {"application/json": {"example": _ANSWER}, "text/event-stream": {"example": _EVENT}},
        }
    },
)
async def create_response(
    request: Request, body: Annotated[ResponseRequest, Body()], caller: StreamCallerDep
) -> Response:
    """Nothing is stored: `previous_response_id` is refused, and each request must contain its whole conversation."""
    fields = body.model_dump(exclude_unset=True)
    made = response.Response(fields)
    answered = await model_server.ask(request, caller.project_id, asked.to_chat(fields), shown_as=made.id)
    if answered.stream is not None:
        return EventStream(response.Events(made).of(answered.stream.chunks()), answered.stream, answered.headers)
    if answered.status != 200:
        return JSONResponse(_in_this_dialect(answered.body), answered.status, answered.headers)
    return JSONResponse(made.of_completion(answered.body), headers=answered.headers)


@router.api_route(
    "/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False, dependencies=[ANY_KEY]
)
def no_kept_response(rest: str) -> None:
    raise RouteNotFound(
        what=f"No response '{rest}': this server stores none. `POST /v1/responses` returns the response itself."
    )


def _in_this_dialect(said: dict[str, Any]) -> dict[str, Any]:
    """Returns an error of the model server with its field renamed to the Responses API's."""
    error = said["error"]
    field, dot, rest = str(error["param"] or "").partition(".")
    name, bracket, place = field.partition("[")
    param = f"{asked.PARAMS.get(name, name)}{bracket}{place}{dot}{rest}" or None
    return {"error": {**error, "param": param}}
