"""The model server's HTTP interface, in OpenAI's format.

It trusts its caller: the API has checked the key, found the model and says where its files are. Bind it to an address
that only the API can reach.
"""

import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tunery.errors import AnswerTooSlow, Overloaded, Rejected, TuneryError, Unavailable
from tunery.serving import LOAD_ROUTE, Chosen, Rates
from worker.server.answer import Answer
from worker.server.backends.backend import Backend
from worker.server.replies import Reply, StreamedChoice
from worker.server.request_queue import RequestQueue, Turn
from worker.server.schemas import ChatRequest, parse

log = logging.getLogger(__name__)

T = TypeVar("T")


async def _parsed(request: Request) -> ChatRequest:
    return await run_in_threadpool(parse, await request.body())


ChatBody = Annotated[ChatRequest, Depends(_parsed)]


async def _turn(request: Request, _: ChatBody) -> AsyncIterator[Turn]:
    # Depends on the parsed body, so that an invalid request does not wait in line. A dependency ends after the last
    # byte is sent or the client has disconnected, also for a stream; a `finally` in a body iterator does not guarantee
    # that, as an iterator that was never started is never closed.
    queue: RequestQueue = request.app.state.queue
    async with queue.turn() as turn:
        yield turn


TurnDep = Annotated[Turn, Depends(_turn)]


def create_app(backend: Backend, *, places: int = 32, seconds: float = 600, device_name: str | None = None) -> FastAPI:
    """Returns the app for a back end; at most `places` requests wait, and an answer takes at most `seconds`.

    `device_name`: the driver's name of the back end's device. Absent: the back end's own.
    """
    queue = RequestQueue(backend, places, seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="Tunery's model server", lifespan=lifespan, openapi_url=None)
    app.state.queue, app.state.device_name = queue, device_name or backend.device
    app.add_api_route("/healthz", _healthz, methods=["GET", "HEAD"])
    app.add_api_route("/v1/rates", _rates, methods=["GET"])
    app.add_api_route("/v1/chat/completions", _complete, methods=["POST"], response_model=None)
    app.add_api_route(LOAD_ROUTE, _load, methods=["POST"], status_code=202)
    app.add_exception_handler(TuneryError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_error)
    return app


async def _healthz(request: Request) -> dict[str, Any]:
    queue: RequestQueue = request.app.state.queue
    return {
        "status": "ok",
        "model": queue.backend.loaded,
        "device": queue.backend.device,
        "busy": queue.busy,
        "running": queue.running,
        "waiting": queue.waiting,
    }


async def _rates(request: Request) -> Rates:
    queue: RequestQueue = request.app.state.queue
    return Rates(device=request.app.state.device_name, rates=queue.meter.rates)


async def _load(request: Request, chosen: Chosen) -> None:
    queue: RequestQueue = request.app.state.queue
    queue.load(chosen)


async def _complete(request: Request, chat: ChatBody, turn: TurnDep) -> Response:
    if await request.is_disconnected():  # disconnected while it waited
        return Response(status_code=499)
    reply, pieces = Reply(chat), turn.pieces(chat)
    # The first piece comes before the status line, so that an error of the model or prompt can still be an HTTP error.
    pieces = _chain(await anext(pieces), pieces)
    if chat.stream:
        return StreamingResponse(_events(reply, pieces), media_type="text/event-stream")
    texts: defaultdict[int, list[str]] = defaultdict(list)
    async for index, answer, piece in pieces:
        if piece is None:
            reply.add(index, answer, "".join(texts[index]))
        else:
            texts[index].append(piece)
        if await request.is_disconnected():
            return Response(status_code=499)
    return JSONResponse(reply.whole())


async def _events(reply: Reply, pieces: AsyncIterator[tuple[int, Answer, str | None]]) -> AsyncIterator[str]:
    choices: dict[int, StreamedChoice] = {}
    try:
        async for index, answer, piece in pieces:
            choice = choices.setdefault(index, StreamedChoice(reply, index, answer))
            for chunk in choice.chunks(piece):
                yield _event(chunk)
            if piece is None:
                reply.add(index, answer, "")
        if reply.chat.wants_usage:
            yield _event(reply.usage_chunk())
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001  the status line is sent already, so any error is sent as an event
        yield _event(_envelope(error))


async def _chain(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for one in others:
        yield one


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


_STATUS: dict[type[Exception], int] = {AnswerTooSlow: 504, Overloaded: 429, Rejected: 400, Unavailable: 503}
_HEADERS = {
    429: {"retry-after": "2"},
    503: {"retry-after": "2"},
    504: {"x-should-retry": "false"},  # it would take as long again
}


def _status(error: Exception) -> int:
    """Returns the status of the error's nearest base class that has one."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)


def _envelope(error: Exception) -> dict[str, Any]:
    """Returns OpenAI's error body. The text of an internal error goes to the log only."""
    if not isinstance(error, TuneryError):
        log.error("a request failed", exc_info=error)
        message, param, code = "The model server failed. Its log has the reason.", None, TuneryError.code
    else:
        message, param, code = error.message, error.param, error.code
    kind = {400: "invalid_request_error", 429: code}.get(_status(error), "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _answer_error(_: Request, error: Exception) -> Response:
    status = _status(error)
    return JSONResponse(_envelope(error), status, _HEADERS.get(status))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)
