"""Chat completions: the model is found here, the words come from the model server."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field

from api import model_server
from api.bodies import LongJsonRoute
from api.dependencies import SessionsDep, SettingsDep, StreamCallerDep
from api.errors import envelope
from api.schemas.wire import errors
from tunery.errors import Unavailable

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
    responses=errors(404)
    | {
        200: {
            "description": "The answer, or with `stream` its pieces as server-sent events",
            "content": {"application/json": {"example": _ANSWER}, "text/event-stream": {"example": "data: [DONE]\n\n"}},
        }
    },
)
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatRequest, Body()],
    caller: StreamCallerDep,
    sessions: SessionsDep,
    settings: SettingsDep,
) -> Response:
    """Rendered with the very template that the model was trained with."""
    fields = body.model_dump(exclude_unset=True)
    answered = await model_server.ask(request, sessions, settings.server_url, caller.project_id, fields)
    if answered.chunks is not None:
        return StreamingResponse(_relay(answered.chunks), media_type=answered.kind)
    return Response(answered.content, answered.status, answered.headers, media_type=answered.kind)


async def _relay(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The server's events as they come. The status is out by now: a break is told as an event of its own."""
    try:
        async for chunk in chunks:
            yield chunk
    except Unavailable as error:
        told = envelope(error.message, type="server_error", code=error.code)
        yield f"data: {json.dumps(told)}\n\n".encode()
