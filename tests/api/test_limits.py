"""Limits of a project's requests to models, as OpenAI's client sees them, and the usage that is stored."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
from cloned_databases import Database
from fastapi import FastAPI
from model_server import ModelServer, ask_and_leave
from openai import OpenAI
from sqlalchemy import func, select, update
from teams import ALIAS, BASE, Team

from api import rate_headers
from tunery import processes
from tunery.traffic.model import ModelUsage, RequestRate

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}]}


@pytest.fixture
def limited(
    server: ModelServer, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> Callable[..., Team]:
    """Makes the team with limits, its API in front of `server`."""
    address = serve(server.app)
    return lambda **limits: team.on(make_app(server_url=address, **limits))


def test_every_answer_says_what_is_left(limited: Callable[..., Team]) -> None:
    team = limited(requests_per_minute=60, tokens_per_minute=1000)
    client = team.openai()
    heads = [
        client.chat.completions.with_raw_response.create(model=BASE, max_tokens=100, **ASK).headers,
        client.responses.with_raw_response.create(model=BASE, input="q", max_output_tokens=100).headers,
        client.chat.completions.with_raw_response.create(model=BASE, stream=True, **ASK).headers,
    ]
    left = [int(head["x-ratelimit-remaining-requests"]) for head in heads]
    assert left[0] == 59  # of a full bucket of 60; one request is refilled each second
    assert 57 <= left[2] <= left[1] <= 59
    assert {head["x-ratelimit-limit-requests"] for head in heads} == {"60"}
    assert {head["x-ratelimit-limit-tokens"] for head in heads} == {"1000"}
    assert heads[0]["x-ratelimit-reset-requests"] in ("1s", "999ms", "1000ms")
    # A request is charged a tenth of the minute's tokens plus its prompt; once it ends, only the 7 that it used.
    assert 880 < int(heads[0]["x-ratelimit-remaining-tokens"]) < 900
    assert 870 < int(heads[1]["x-ratelimit-remaining-tokens"]) < 895


def test_without_limits_nothing_is_said(limited: Callable[..., Team]) -> None:
    head = limited().openai().chat.completions.with_raw_response.create(model=BASE, **ASK).headers
    assert not [name for name in head if name.startswith("x-ratelimit")]


def test_a_burst_is_refused_in_openais_words(limited: Callable[..., Team], server: ModelServer) -> None:
    team = limited(requests_per_minute=2)
    for _ in range(2):
        team.openai().chat.completions.create(model=BASE, **ASK)
    with pytest.raises(openai.RateLimitError) as refused:
        team.openai().chat.completions.create(model=BASE, **ASK)
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
    head = refused.value.response.headers
    assert 28 <= int(head["retry-after"]) <= 30
    assert head["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in head
    assert len(server.received) == 2


def test_the_client_waits_and_sends_again(
    limited: Callable[..., Team], server: ModelServer, database: Database
) -> None:
    client = limited(requests_per_minute=60).openai().with_options(max_retries=1)
    client.chat.completions.create(model=BASE, **ASK)
    with database.sessions.begin() as session:
        session.execute(update(RequestRate).values(requests_left=0, at=func.clock_timestamp()))
    began = time.monotonic()
    client.chat.completions.create(model=BASE, **ASK)
    assert 1 <= time.monotonic() - began < 5
    assert len(server.received) == 2


def test_a_projects_own_limit_counts_and_others_go_on(
    limited: Callable[..., Team], make_team: Callable[..., Team], database: Database
) -> None:
    team = limited()
    closed = make_team("beta", requests_per_minute=0).on(team.http.app)  # type: ignore[arg-type]
    with pytest.raises(openai.RateLimitError) as refused:
        closed.openai().chat.completions.create(model=BASE, **ASK)
    assert refused.value.response.headers["retry-after"] == "86400"
    assert team.openai().chat.completions.create(model=BASE, **ASK).choices


def test_open_requests_of_a_project_are_bounded(
    server: ModelServer, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> None:
    server.waits = True
    app = make_app(server_url=serve(server.app), open_requests=1)
    address = serve(app)
    ask_and_leave(address, team.key, {"model": base, **ASK}, server)
    assert server.left.wait(20)
    assert processes.wait_until(lambda: not any(app.state.open_requests.values()), seconds=20, alive=lambda: True)
    app.state.open_requests[team.id] = 1
    client = OpenAI(api_key=team.key, base_url=f"{address}/v1", max_retries=0)
    with pytest.raises(openai.RateLimitError, match="limit of 1 concurrent requests") as refused:
        client.chat.completions.create(model=base, **ASK)
    assert refused.value.response.headers["retry-after"] == "1"


def test_an_answer_has_a_time(limited: Callable[..., Team], server: ModelServer) -> None:
    server.waits = True
    with pytest.raises(openai.InternalServerError) as late:
        limited(server_seconds=0.3).openai().chat.completions.create(model=BASE, **ASK)
    assert (late.value.status_code, late.value.code) == (504, "answer_too_slow")
    assert late.value.response.headers["x-should-retry"] == "false"
    assert server.left.wait(20)


def test_a_stream_has_a_time(limited: Callable[..., Team], server: ModelServer) -> None:
    server.stalls = True
    team = limited(server_seconds=0.5)
    heard: list[str | None] = []

    def listen() -> None:
        for chunk in team.openai().chat.completions.create(model=BASE, stream=True, **ASK):
            heard.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError) as late:
        listen()
    assert (heard, late.value.code) == (["hel"], "answer_too_slow")


def used(database: Database, team: Team) -> list[tuple[str, int, int, int]]:
    with database.sessions() as session:
        rows = session.scalars(select(ModelUsage).where(ModelUsage.project_id == team.id)).all()
        assert {row.day for row in rows} <= {datetime.now(UTC).date()}
        return [(row.model_id, row.requests, row.prompt_tokens, row.completion_tokens) for row in rows]


def test_usage_is_stored_whatever_the_dialect(limited: Callable[..., Team], database: Database) -> None:
    team = limited()
    client = team.openai(strict=True)
    client.chat.completions.create(model=ALIAS, **ASK)
    client.responses.create(model=BASE, input="q")
    chunks = list(client.chat.completions.create(model=BASE, stream=True, **ASK))
    assert [len(chunk.choices) for chunk in chunks] == [1, 1], "the counts were not asked for"
    assert "usage" not in chunks[0].model_fields_set
    asked: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=BASE, **asked, **ASK))
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 7
    assert used(database, team) == [(BASE, 4, 20, 8)]


def test_a_stream_that_breaks_is_counted_as_far_as_it_went(
    limited: Callable[..., Team], server: ModelServer, database: Database
) -> None:
    server.breaks = True
    team = limited()
    answer = team.http.post("/v1/chat/completions", json={"model": BASE, "stream": True, **ASK})
    assert "unavailable" in answer.text
    [(_, requests, prompt, completion)] = used(database, team)
    assert (requests, completion) == (1, 1)
    assert 5 < prompt < 20


def test_a_refused_request_is_not_counted(
    limited: Callable[..., Team], server: ModelServer, database: Database
) -> None:
    server.status = 400
    team = limited(tokens_per_minute=1000)
    asked = {"model": BASE, "max_tokens": 900, **ASK}
    assert [team.http.post("/v1/chat/completions", json=asked).status_code for _ in range(3)] == [400] * 3
    assert used(database, team) == []


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (59.5, "1m0s"), (360, "6m0s")]
)
def test_durations_are_spelled_as_openai_does(seconds: float, spelled: str) -> None:
    assert rate_headers.spell(seconds) == spelled
