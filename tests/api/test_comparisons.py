"""Comparing models' answers, in front of a model server that records its requests."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from model_server import ModelServer
from teams import ALIAS, BASE, Team


@pytest.fixture
def comparing(
    server: ModelServer, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> Callable[..., Any]:
    app = make_app(server_url=serve(server.app), requests_per_minute=7)
    return lambda **body: team.on(app).http.post("/v1/models/compare", json=body)


def test_a_tuned_model_is_compared_with_its_base(
    comparing: Callable[..., Any], server: ModelServer, tuned: str
) -> None:
    chat = [{"role": "user", "content": "And you?"}]
    answer = comparing(models=[tuned], prompts=["Hi", chat], system="Be brief.", max_completion_tokens=9)
    found = answer.json()
    assert (answer.status_code, found["models"]) == (200, [BASE, tuned])
    first, second = found["data"]
    assert (first["index"], first["same"], second["messages"]) == (0, True, chat)
    assert [(one["model"], one["content"], one["completion_tokens"]) for one in first["answers"]] == [
        (BASE, "a", 2),
        (tuned, "a", 2),
    ]
    assert [one["temperature"] for one in server.received] == [0] * 4
    assert {one["max_completion_tokens"] for one in server.received} == {9}
    assert [message["role"] for message in server.received[0]["messages"]] == ["system", "user"]
    asked = [(one["tunery_model"]["tuned"] or {}).get("id") for one in server.received[:2]]
    assert sorted(asked, key=str) == sorted([None, tuned], key=str)
    assert answer.headers["x-ratelimit-limit-requests"] == "7"


def test_models_that_differ_are_not_the_same(
    comparing: Callable[..., Any], server: ModelServer, tuned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(("yes", "no"))
    monkeypatch.setattr(
        ModelServer, "message", property(lambda _: {"content": next(said)}, lambda *_: None), raising=False
    )
    [row] = comparing(models=[ALIAS, tuned], prompts=["Hi"]).json()["data"]
    assert row["same"] is False
    assert {one["content"] for one in row["answers"]} == {"yes", "no"}
    assert [one["model"] for one in row["answers"]] == [ALIAS, tuned]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"models": [BASE], "prompts": ["Hi"]}, 400, "models"),
        ({"models": [], "prompts": ["Hi"]}, 400, "models"),
        ({"models": [BASE] * 5, "prompts": ["Hi"]}, 400, "models"),
        ({"models": [BASE, "none"], "prompts": ["Hi"]}, 404, "model"),
        ({"models": [BASE, BASE], "prompts": []}, 400, "prompts"),
        ({"models": [BASE, BASE], "prompts": ["Hi"], "tools": []}, 400, "tools"),
    ],
)
def test_what_cannot_be_compared(
    comparing: Callable[..., Any], server: ModelServer, body: dict[str, Any], status: int, param: str
) -> None:
    answer = comparing(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert server.received == []


def test_errors_of_the_server_and_of_limits_pass(comparing: Callable[..., Any], server: ModelServer) -> None:
    server.status = 400
    assert comparing(models=[BASE, BASE], prompts=["Hi"]).json()["error"]["param"] == "n"
    server.status = 200
    answer = comparing(models=[BASE, BASE], prompts=["1", "2", "3", "4"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
