"""Chat completions: the model is found here, the words come from the model server."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any, TypeVar

import httpx2
from fastapi import APIRouter, Body, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import ClientDisconnect

from api.bodies import LongJsonRoute
from api.dependencies import SessionsDep, SettingsDep, StreamCallerDep
from api.errors import envelope
from api.schemas.wire import errors
from tunery import serving
from tunery.errors import Unavailable
from tunery.models import registry
from tunery.models.model import Model
from tunery.serving import Chosen

router = APIRouter(prefix="/v1", tags=["Chat"], route_class=LongJsonRoute)

Result = TypeVar("Result")
TIMEOUT = httpx2.Timeout(600, connect=5)
"""A long answer of a model on a CPU takes minutes; a server that is not there is known at once."""
_PASSED_ON = ("retry-after",)

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
    found = await run_in_threadpool(_find, sessions, caller.project_id, body.model)
    asked = await run_in_threadpool(_encoded, body, found)
    # A client a request: connections are local, and a pool would be tied to one event loop.
    client = httpx2.AsyncClient(timeout=TIMEOUT, trust_env=False)
    try:
        upstream = await _while_connected(request, _send(client, settings.server_url, asked))
        kind = upstream.headers.get("content-type", "application/json")
        if kind.startswith("text/event-stream"):
            return StreamingResponse(_relay(client, upstream), media_type=kind)
        content = await _while_connected(request, _read(upstream))
    except BaseException:
        await client.aclose()
        raise
    await client.aclose()
    headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
    return Response(content, upstream.status_code, headers, media_type=kind)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result, unless the caller hangs up first: the model server then stops too, for one model answers all.

    Raises ClientDisconnect.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _find(sessions: sessionmaker[Session], project_id: str, name: str) -> Chosen:
    """What the server needs to load the model: where its files lie, and their manifest's digest."""
    with sessions.begin() as session:
        model = registry.find_ready(session, project_id, name)
        base = model if model.base_id is None else session.get_one(Model, model.base_id)
        tuned = None if base is model else {**_place(model), "technique": model.technique}
        return Chosen.model_validate({"base": _place(base), "tuned": tuned})


def _place(model: Model) -> dict[str, Any]:
    return {"id": model.id, "prefix": model.prefix, "manifest_sha256": model.manifest_sha256}


def _encoded(body: ChatRequest, chosen: Chosen) -> bytes:
    return serving.encode(body.model_dump(exclude_unset=True), chosen)


async def _send(client: httpx2.AsyncClient, server_url: str, body: bytes) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    request = client.build_request("POST", f"{server_url}/v1/chat/completions", content=body, headers=headers)
    try:
        return await client.send(request, stream=True)
    except httpx2.HTTPError:
        raise Unavailable(part="The model server") from None


async def _read(upstream: httpx2.Response) -> bytes:
    try:
        return await upstream.aread()
    except httpx2.HTTPError:
        raise Unavailable(part="The model server") from None


async def _relay(client: httpx2.AsyncClient, upstream: httpx2.Response) -> AsyncIterator[bytes]:
    """The server's events as they come. The status is out by now: a break is told as an event of its own."""
    try:
        async for chunk in upstream.aiter_raw():
            yield chunk
    except httpx2.HTTPError:
        error = Unavailable(part="The model server")
        told = envelope(error.message, type="server_error", code=error.code)
        yield f"data: {json.dumps(told)}\n\n".encode()
    finally:
        await upstream.aclose()
        await client.aclose()
