"""Sends requests to the model server, with the model found and authorised here."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import anyio
import httpx2
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from api import metering
from api.errors import envelope
from api.metering import Admission
from tunery import serving
from tunery.errors import AnswerTooSlow, TuneryError, Unavailable
from tunery.settings import Settings

Result = TypeVar("Result")
Json = dict[str, Any]
_PASSED_ON = ("retry-after", "x-should-retry")


@dataclass(frozen=True)
class Answered:
    """The model server's answer: its status, and either its `body` or, where it streams, its `stream`."""

    status: int
    headers: dict[str, str]
    body: Json
    stream: "Stream | None" = None


async def ask(request: Request, project_id: str, fields: Mapping[str, Any], *, shown_as: str | None = None) -> Answered:
    """Asks for the chat completion of these fields, as long as the caller stays. A `stream` has to be closed.
    `shown_as`: the id that the caller sees, where it is not that of the completion.

    Raises ModelNotFound, WrongState, RateLimited, TooManyOpen, Unavailable, AnswerTooSlow.
    """
    settings: Settings = request.app.state.settings
    admission = await metering.admit(request.app, project_id, fields, shown_as=shown_as)
    # A client a request: connections are local, and a pool would be tied to one event loop.
    timeout = httpx2.Timeout(settings.server_seconds, connect=5)  # a server that is not there is known at once
    client = httpx2.AsyncClient(timeout=timeout, trust_env=False, verify=_authorities())
    stream: Stream | None = None
    try:
        body = serving.encode(_counted(fields), admission.chosen)
        async with _in_time(admission, settings):
            upstream = await _while_connected(request, _send(client, settings.server_url, body))
            headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
            headers |= admission.headers
            if upstream.headers.get("content-type", "").startswith("text/event-stream"):
                stream = Stream(admission, client, upstream, with_usage=_wants_usage(fields))
                return Answered(upstream.status_code, headers, {}, stream)
            answer = await _while_connected(request, _read(upstream))
        admission.note(answer)
        return Answered(upstream.status_code, headers, answer)
    finally:
        if stream is None:
            await client.aclose()
            await admission.end()


@cache
def _authorities() -> ssl.SSLContext:
    """The certificates that a server is known by, read once: a client reads them for tens of milliseconds otherwise,
    in which the loop carries no other stream on."""
    return httpx2.create_ssl_context(trust_env=False)


class Stream:
    """The chunks of an answer as they arrive. `close` must be called."""

    def __init__(
        self, admission: Admission, client: httpx2.AsyncClient, upstream: httpx2.Response, *, with_usage: bool
    ) -> None:
        self._admission, self._client, self._upstream = admission, client, upstream
        self._with_usage = with_usage

    async def chunks(self) -> AsyncIterator[Json]:
        """Each chunk; where the answer breaks off, the last one is an error's envelope. The status is out by then."""
        try:
            async for line in self._lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    chunk = from_json(line.removeprefix(b"data: "))
                    self._admission.note(chunk)
                    if shown := self._shown(chunk):
                        yield shown
            # Before the caller reads the end: feedback on a request that is kept may follow at once.
            await self._admission.end()
        except TuneryError as error:
            yield envelope(error.message, type="server_error", code=error.code)

    async def close(self) -> None:
        """Ends the request, whether or not it was read to its end: the model server then stops too."""
        with anyio.CancelScope(shield=True):
            try:
                await self._upstream.aclose()
                await self._client.aclose()
            finally:
                await self._admission.end()

    def _shown(self, chunk: Json) -> Json | None:
        """Returns the chunk as the caller asked for it: the counts were asked for by us."""
        if self._with_usage or "error" in chunk:
            return chunk
        chunk.pop("usage", None)
        return chunk if chunk["choices"] else None

    async def _lines(self) -> AsyncIterator[bytes]:
        settings: Settings = self._admission.app.state.settings
        parts, rest = self._upstream.aiter_raw(), b""
        while True:
            # Around each part: a timeout must not span a `yield`, where other code runs.
            async with _in_time(self._admission, settings):
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
                except httpx2.HTTPError:
                    raise Unavailable(part="The model server") from None
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line.rstrip(b"\r")


class Closable(Protocol):
    async def close(self) -> None: ...


class EventStream(StreamingResponse):
    """Server-sent events of a stream, which is closed at the end.

    Not in a `finally` of the generator, which never starts if the caller leaves before the first event.
    """

    def __init__(self, events: AsyncIterator[str], stream: "Closable", headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()


async def events(stream: Stream) -> AsyncIterator[str]:
    """Yields a stream's chunks in OpenAI's format, with [DONE] after the last."""
    async for chunk in stream.chunks():
        yield f"data: {json.dumps(chunk)}\n\n"
        if "error" in chunk:
            return
    yield "data: [DONE]\n\n"


@asynccontextmanager
async def _in_time(admission: Admission, settings: Settings) -> AsyncIterator[None]:
    """Raises AnswerTooSlow where the block is not left before the request's deadline."""
    try:
        async with asyncio.timeout_at(admission.deadline):
            yield
    except TimeoutError:
        raise AnswerTooSlow(seconds=settings.server_seconds) from None


def _wants_usage(fields: Mapping[str, Any]) -> bool:
    options = fields.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _counted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, so that the last chunk of a stream has the counts. What is wrong in them stays for the server."""
    options = fields.get("stream_options") or {}
    if fields.get("stream") is not True or not isinstance(options, dict):
        return dict(fields)
    return {**fields, "stream_options": {**options, "include_usage": True}}


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the work's result, unless the caller hangs up first: the model server then stops too.

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


async def _send(client: httpx2.AsyncClient, server_url: str, body: bytes) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    request = client.build_request("POST", f"{server_url}/v1/chat/completions", content=body, headers=headers)
    try:
        return await client.send(request, stream=True)
    except httpx2.HTTPError:
        raise Unavailable(part="The model server") from None


async def _read(upstream: httpx2.Response) -> Json:
    try:
        answer: Json = from_json(await upstream.aread())
        return answer
    except (httpx2.HTTPError, ValueError):
        raise Unavailable(part="The model server") from None
