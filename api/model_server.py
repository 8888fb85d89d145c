"""Requests to the model server: the model is found here, the words come from there."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import ClientDisconnect

from tunery import serving
from tunery.errors import Unavailable
from tunery.models import registry
from tunery.models.model import Model
from tunery.serving import Chosen

Result = TypeVar("Result")
TIMEOUT = httpx2.Timeout(600, connect=5)
"""A long answer of a model on a CPU takes minutes; a server that is not there is known at once."""
_PASSED_ON = ("retry-after", "x-should-retry")


@dataclass(frozen=True)
class Answered:
    """The model server's answer: its status, and either all of its `content` or, where it streams, its `chunks`."""

    status: int
    kind: str
    headers: dict[str, str]
    content: bytes = b""
    chunks: AsyncIterator[bytes] | None = None


async def ask(
    request: Request, sessions: sessionmaker[Session], server_url: str, project_id: str, fields: Mapping[str, Any]
) -> Answered:
    """Asks for the chat completion of these fields, as long as the caller stays. `chunks` have to be read or closed.

    Raises ModelNotFound, Unavailable; in `chunks` Unavailable alone.
    """
    found = await run_in_threadpool(_find, sessions, project_id, fields["model"])
    body = await run_in_threadpool(serving.encode, fields, found)
    # A client a request: connections are local, and a pool would be tied to one event loop.
    client = httpx2.AsyncClient(timeout=TIMEOUT, trust_env=False)
    try:
        upstream = await _while_connected(request, _send(client, server_url, body))
        kind = upstream.headers.get("content-type", "application/json")
        headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
        if kind.startswith("text/event-stream"):
            return Answered(upstream.status_code, kind, headers, chunks=_chunks(client, upstream))
        content = await _while_connected(request, _read(upstream))
    except BaseException:
        await client.aclose()
        raise
    await client.aclose()
    return Answered(upstream.status_code, kind, headers, content)


async def _chunks(client: httpx2.AsyncClient, upstream: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in upstream.aiter_raw():
            yield chunk
    except httpx2.HTTPError:
        raise Unavailable(part="The model server") from None
    finally:
        await upstream.aclose()
        await client.aclose()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result, unless the caller hangs up first: the model server then stops too.

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
