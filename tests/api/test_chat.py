"""Chat completions pass through: the model is found here, a server behind a real socket answers."""

import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
import rows
from databases import Database
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from teams import ALIAS, BASE, Team

from tunery.jobs.states import State
from tunery.keys.model import Project

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}]}
CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


class Server:
    """Stands in for the model server: keeps what it was sent, and answers what the test wants."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.breaks = self.waits = False
        self.left = threading.Event()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.received.append(body)
        self.headers.append(dict(request.headers))
        if self.waits:
            await _hung_up(request)
            self.left.set()
        if self.status != 200:
            error = {"message": "n: 1 only", "type": "invalid_request_error", "param": "n", "code": "unsupported"}
            return JSONResponse({"error": error}, self.status)
        if body.get("stream"):
            return StreamingResponse(self.stream(), media_type="text/event-stream")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "a"},
            "finish_reason": "stop",
            "logprobs": None,
        }
        return JSONResponse({**CHUNK, "object": "chat.completion", "choices": [choice]})

    async def stream(self) -> AsyncIterator[str]:
        for word in ("hel", "lo"):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            yield f"data: {json.dumps({**CHUNK, 'choices': [choice]})}\n\n"
            if self.breaks:
                raise ConnectionError("the server dies")
        yield "data: [DONE]\n\n"


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def chatting(
    server: Server, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> Team:
    """The team, its API in front of `server`."""
    return team.on(make_app(server_url=serve(server.app)))


def test_base_by_alias(chatting: Team, server: Server) -> None:
    answer = chatting.openai(strict=True).chat.completions.create(model=ALIAS, temperature=0, seed=1, **ASK)
    assert answer.choices[0].message.content == "a"
    [received] = server.received
    assert {name: received[name] for name in ("model", "temperature", "seed")} == {
        "model": ALIAS,
        "temperature": 0,
        "seed": 1,
    }
    assert received["tunery_model"]["base"]["id"] == BASE
    assert set(received["tunery_model"]["base"]) == {"id", "prefix", "manifest_sha256"}
    assert received["tunery_model"]["tuned"] is None
    assert "authorization" not in server.headers[0]


def test_tuned_model(chatting: Team, server: Server, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, chatting.id), base_model=BASE)
        rows.bring(session, job, State.SUCCEEDED)
        tuned = str(job.tuned_model)
    chatting.openai().chat.completions.create(model=tuned, **ASK)
    named = server.received[0]["tunery_model"]
    assert (named["base"]["id"], named["tuned"]["id"], named["tuned"]["technique"]) == (BASE, tuned, "lora")
    assert set(named["tuned"]) == {"id", "prefix", "manifest_sha256", "technique"}


def test_stream(chatting: Team) -> None:
    stream = chatting.openai().chat.completions.create(model=BASE, stream=True, **ASK)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["hel", "lo"]


def test_a_stream_that_breaks_says_so(chatting: Team, server: Server) -> None:
    server.breaks = True
    heard: list[str | None] = []

    def listen() -> None:
        stream = chatting.openai().chat.completions.create(model=BASE, stream=True, **ASK)
        heard.extend(chunk.choices[0].delta.content for chunk in stream)

    with pytest.raises(openai.APIError) as broken:
        listen()
    assert heard == ["hel"]
    assert broken.value.code == "unavailable"


def test_a_caller_who_hangs_up_frees_the_server(
    server: Server, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> None:
    server.waits = True
    address = serve(make_app(server_url=serve(server.app)))
    headers = {"authorization": f"Bearer {team.key}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": base, **ASK},
            headers=headers,
            timeout=httpx.Timeout(20, read=1),
            trust_env=False,
        )
    assert server.left.wait(20)


def test_the_servers_refusals_pass(chatting: Team, server: Server) -> None:
    server.status = 400
    with pytest.raises(openai.BadRequestError) as refused:
        chatting.openai().chat.completions.create(model=BASE, n=2, **ASK)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported")


def test_the_server_is_down(make_app: Callable[..., FastAPI], team: Team, base: str) -> None:
    lonely = team.on(make_app(server_url="http://127.0.0.1:1"))
    answer = lonely.http.post("/v1/chat/completions", json={"model": BASE, **ASK})
    assert answer.status_code == 503
    assert "The model server does not answer" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]


def test_users_cannot_name_a_models_files(chatting: Team, server: Server) -> None:
    forged = {"base": {"id": "x", "prefix": "jobs/other", "manifest_sha256": "0"}, "tuned": None}
    answer = chatting.http.post("/v1/chat/completions", json={"model": BASE, "tunery_model": forged, **ASK})
    assert answer.status_code == 200
    assert server.received[0]["tunery_model"]["base"]["id"] == BASE


def test_unknown_model(chatting: Team, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        chatting.openai().chat.completions.create(model="none", **ASK)
    assert refused.value.code == "model_not_found"
    assert server.received == []
