"""Text completions, the older API: a model continues a text, without a chat template."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from api import model_server, text_completions
from api.dependencies import StreamCallerDep
from api.errors import envelope
from api.json_route import LongJsonRoute
from api.model_server import Answered, EventStream
from api.schemas.base import errors
from tunery.errors import TuneryError

router = APIRouter(prefix="/v1", tags=["Chat"], route_class=LongJsonRoute)

_ANSWER = {
    "id": "cmpl-abc123",
    "object": "text_completion",
    "created": 1721764800,
    "model": "SmolLM2-135M-Instruct",
    "choices": [{"text": " Paris.", "index": 0, "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9},
    "system_fingerprint": None,
}


class CompletionRequest(BaseModel):
    """What the API itself must know; the other fields are those of OpenAI's text completions."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"model": "SmolLM2-135M-Instruct", "prompt": "The capital of France is", "max_tokens": 8}]
        },
    )

    model: str = Field(min_length=1, description="A base or fine-tuned model: id, alias or the base's hub id")
    prompt: str | list[Any] = Field(description="A text or several, each of which is continued independently")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None


@router.post(
    "/completions",
    summary="Complete a text",
    response_class=Response,
    responses=errors(404, 429, 504)
    | {
        200: {
            "description": "The text, or with `stream` its parts as server-sent events",
            "content": {"application/json": {"example": _ANSWER}, "text/event-stream": {"example": "data: [DONE]\n\n"}},
        }
    },
)
async def create_completion(
    request: Request, body: Annotated[CompletionRequest, Body()], caller: StreamCallerDep
) -> Response:
    """Several prompts are completed one after another, each counted as a separate request."""
    fields = body.model_dump(exclude_unset=True)
    asked = [text_completions.to_chat(fields, prompt) for prompt in text_completions.prompts(fields)]
    first = await model_server.ask(request, caller.project_id, asked[0])
    if first.stream is not None:
        answers = _Answers(request, caller.project_id, asked, first, body.n or 1)
        return EventStream(answers.events(), answers, first.headers)
    said: list[dict[str, Any]] = []
    for place, one in enumerate(asked):
        answered = await model_server.ask(request, caller.project_id, one) if place else first
        if answered.status != 200:
            return JSONResponse(answered.body, answered.status, answered.headers)
        said.append(text_completions.of_chat(answered.body, first=place * (body.n or 1)))
    return JSONResponse(text_completions.joined(said), headers=answered.headers)


class _Answers:
    """The streams of several prompts, one after the other."""

    def __init__(
        self, request: Request, project_id: str, asked: list[dict[str, Any]], first: Answered, choices: int
    ) -> None:
        self._request, self._project_id, self._asked, self._choices = request, project_id, asked, choices
        self._now = first

    async def events(self) -> AsyncIterator[str]:
        for place, one in enumerate(self._asked):
            if place:
                await self.close()
                try:
                    self._now = await model_server.ask(self._request, self._project_id, one)
                except TuneryError as error:  # the status is out by now
                    yield _event(envelope(error.message, type="server_error", code=error.code))
                    return
            async for chunk in self._chunks():
                if "error" in chunk:
                    yield _event(chunk)
                    return
                yield _event(text_completions.of_chat(chunk, first=place * self._choices))
        yield "data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        if self._now.stream is None:
            yield self._now.body
            return
        async for chunk in self._now.stream.chunks():
            yield chunk

    async def close(self) -> None:
        if self._now.stream is not None:
            await self._now.stream.close()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
