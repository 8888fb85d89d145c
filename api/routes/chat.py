"""Chat completions: the model is found here, and the model server answers."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field

from api import model_server
from api.dependencies import StreamCallerDep
from api.json_route import LongJsonRoute
from api.model_server import EventStream
from api.schemas.base import errors

router = APIRouter(prefix="/v1", tags=["Chat"], route_class=LongJsonRoute)

_ANSWER = {
    "id": "chatcmpl-abc123",
    "object": "chat.completion",
    "created": 1721764800,
    "model": "SmolLM2-135M-Instruct",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 14, "completion_tokens": 3, "total_tokens": 17},
    "system_fingerprint": None,
}


class ChatRequest(BaseModel):
    """What the API itself must know; every other field goes to the model server, which checks it."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": "SmolLM2-135M-Instruct",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_completion_tokens": 32,
                    "temperature": 0,
                }
            ]
        },
    )

    model: str = Field(min_length=1, description="A base or fine-tuned model: id, alias or the base's hub id")
    messages: Annotated[list[dict[str, Any]], FailFast()] = Field(min_length=1)
    stream: bool | None = None


@router.post(
    "/chat/completions",
    summary="Ask a base or fine-tuned model",
    response_class=Response,
    responses=errors(404, 429, 504)
    | {
        200: {
            "description": "The answer, or with `stream` its parts as server-sent events",
            "content": {"application/json": {"example": _ANSWER}, "text/event-stream": {"example": "data: [DONE]\n\n"}},
        }
    },
)
async def create_chat_completion(
    request: Request, body: Annotated[ChatRequest, Body()], caller: StreamCallerDep
) -> Response:
    """The prompt is rendered with the template with which the model was trained."""
    answered = await model_server.ask(request, caller.project_id, body.model_dump(exclude_unset=True))
    if answered.stream is not None:
        return EventStream(model_server.events(answered.stream), answered.stream, answered.headers)
    return JSONResponse(answered.body, answered.status, answered.headers)
