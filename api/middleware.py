"""Wraps every request: gives it an id, limits its body's size and time, and answers every error."""

import asyncio
import time
from typing import Any

from fastapi import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from tunery import ids
from tunery.errors import InvalidValue

MAX_BODY_BYTES = 16 * 2**20
"""A body's limit, unless its route sets one of its own (`allow`)."""
DRAIN_BYTES = 600 * 2**20
DRAIN_SECONDS = 120
DRAIN_IDLE_SECONDS = 5.0
"""Seconds without data from the client after which it gets its answer, as no reset is to be feared then."""
BODY_SECONDS = 60.0
"""Time for a body of any length."""
BODY_RATE = 1024
"""Bytes a second that a body must come with on average after that: a slow line is slower than nobody's."""


def allow(request: Request, limit: int) -> None:
    """Lets this request's body have `limit` bytes. For routes that stream: only they know that nothing is kept.

    Not decided by the Content-Type, which the caller controls: on every other route the framework collects the whole
    body before it checks the key.
    """
    request.state.max_body_bytes = limit


class Edge:
    """ASGI middleware, outermost: nothing is raised past it while an answer can still be given."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = _Exchange(scope, receive, send)
        try:
            _refuse_ambiguity(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            return None  # nobody is there to be answered
        except Exception as error:
            if exchange.started:
                raise  # half an answer is out: only a broken connection tells the client that it is not whole
            response = errors.answer(error, request_id=exchange.id, route=f"{scope['method']} {scope['path']}")
            await response(scope, exchange.receive, exchange.send)
        return None


def _refuse_ambiguity(scope: Scope) -> None:
    """Raises InvalidValue for a body whose end or text a proxy may read differently."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise InvalidValue(
            reason="The request has both Content-Length and Transfer-Encoding, which contradict each other. Send only "
            "one of them."
        )
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"", b"identity"):
        raise InvalidValue(
            reason=f"The request's body is compressed ({coding.decode('latin-1')[:20]}). Send it without "
            "Content-Encoding; an uploaded file itself may be compressed."
        )


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = ids.new(ids.REQUEST)
        self.started = False
        self._receive, self._send = receive, send
        headers: dict[bytes, bytes] = dict(scope["headers"])
        self._waits = headers.get(b"expect", b"").lower() == b"100-continue"
        self._more = b"content-length" in headers or b"transfer-encoding" in headers
        self._seen, self._waited = 0, 0.0
        self._state = scope.setdefault("state", {})
        self._state |= {"request_id": self.id, "max_body_bytes": MAX_BODY_BYTES}

    async def receive(self) -> Message:
        message = await self._receive_in_time()
        self._more = bool(message.get("more_body", False))
        self._seen += len(message.get("body", b""))
        if self._seen > self._state["max_body_bytes"]:
            raise HTTPException(413, str(self._state["max_body_bytes"]))
        return message

    async def _receive_in_time(self) -> Message:
        """Raises HTTPException. Counts the time in which we wait for the client, not that in which it waits for us.

        After the body's end there is only a disconnection to wait for, which may take its time.
        """
        if not self._more:
            return await self._receive()
        began = time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), BODY_SECONDS + self._seen / BODY_RATE - self._waited)
            self._waited += time.monotonic() - began
            return message
        except TimeoutError:
            self._more = False  # nobody waits for the rest either
            raise HTTPException(408, f"{self._seen}") from None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.id.encode())]}
            if message["status"] >= 400:
                await self._drain()
        await self._send(message)

    async def _drain(self) -> None:
        """Takes the rest of a refused upload: answering while the client still sends makes the kernel reset the
        connection, and the client would see a broken pipe, which it retries, in place of the reason."""
        if self._waits:
            return  # it sends nothing until it is asked to
        taken, until = 0, time.monotonic() + DRAIN_SECONDS
        while self._more and taken < DRAIN_BYTES:
            try:
                message: dict[str, Any] = dict(
                    await asyncio.wait_for(self._receive(), min(DRAIN_IDLE_SECONDS, until - time.monotonic()))
                )
            except TimeoutError:
                return
            self._more = bool(message.get("more_body", False))
            taken += len(message.get("body", b""))
