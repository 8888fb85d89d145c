"""Chat completions are passed on: the API finds the model, and a model server on a real socket answers."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from model_server import ModelServer, ask_and_leave
from teams import ALIAS, BASE, Team

from tunery.errors import InvalidValue
from worker.server.schemas import parse

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}]}


def test_base_by_alias(asking: Team, server: ModelServer) -> None:
    answer = asking.openai(strict=True).chat.completions.create(model=ALIAS, temperature=0, seed=1, **ASK)
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


def test_tuned_model(asking: Team, server: ModelServer, tuned: str) -> None:
    asking.openai().chat.completions.create(model=tuned, **ASK)
    named = server.received[0]["tunery_model"]
    assert (named["base"]["id"], named["tuned"]["id"], named["tuned"]["technique"]) == (BASE, tuned, "lora")
    assert set(named["tuned"]) == {"id", "prefix", "manifest_sha256", "technique"}


def test_a_tuned_model_outlives_its_base(asking: Team, server: ModelServer, tuned: str, admin: Team) -> None:
    assert admin.http.delete(f"/v1/models/{BASE}").status_code == 200
    asking.openai().chat.completions.create(model=tuned, **ASK)
    assert server.received[0]["tunery_model"]["base"]["id"] == BASE


@pytest.mark.parametrize("strict", [False, True])
def test_stream(strict: bool, asking: Team) -> None:
    stream = asking.openai(strict=strict).chat.completions.create(model=BASE, stream=True, **ASK)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["hel", "lo"]


def test_a_stream_that_breaks_says_so(asking: Team, server: ModelServer) -> None:
    server.breaks = True
    heard: list[str | None] = []

    def listen() -> None:
        stream = asking.openai().chat.completions.create(model=BASE, stream=True, **ASK)
        heard.extend(chunk.choices[0].delta.content for chunk in stream)

    with pytest.raises(openai.APIError) as broken:
        listen()
    assert heard == ["hel"]
    assert broken.value.code == "unavailable"


def test_a_caller_who_hangs_up_frees_the_server(
    server: ModelServer, serve: Callable[[Any], str], make_app: Callable[..., FastAPI], team: Team, base: str
) -> None:
    server.waits = True
    address = serve(make_app(server_url=serve(server.app)))
    ask_and_leave(address, team.key, {"model": base, **ASK}, server)
    assert server.left.wait(20)


def test_the_servers_refusals_pass(asking: Team, server: ModelServer) -> None:
    server.status = 400
    with pytest.raises(openai.BadRequestError) as refused:
        asking.openai().chat.completions.create(model=BASE, n=2, **ASK)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported")


def test_an_overloaded_server_says_when_to_come_again(asking: Team, server: ModelServer) -> None:
    server.status = 503
    answer = asking.http.post("/v1/chat/completions", json={"model": BASE, **ASK})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def test_an_answer_is_taken_back_as_a_message(asking: Team, server: ModelServer) -> None:
    """People append `message.model_dump()`, which has every field that the client knows, most of them null."""
    client = asking.openai()
    said = client.chat.completions.create(model=BASE, **ASK).choices[0].message.model_dump()
    assert said["annotations"] is None
    said["annotations"] = [{"type": "url_citation"}]
    messages: list[Any] = [*ASK["messages"], said, {"role": "user", "content": "q"}]
    client.chat.completions.create(model=BASE, messages=messages)
    request = parse(json.dumps(server.received[1]).encode())
    assert [message.content for message in request.messages] == ["q", "a", "q"]


def test_unknown_fields_of_a_message_are_refused() -> None:
    chosen = {"base": {"id": "b", "prefix": "p", "manifest_sha256": "0" * 64}}
    for role, key in (("assistant", "citations"), ("user", "annotations")):
        said = {"role": role, "content": "a", key: [1]}
        with pytest.raises(InvalidValue, match=key):
            parse(json.dumps({"model": "m", "messages": [said], "tunery_model": chosen}).encode())


def test_the_server_is_down(make_app: Callable[..., FastAPI], team: Team, base: str) -> None:
    lonely = team.on(make_app(server_url="http://127.0.0.1:1"))
    answer = lonely.http.post("/v1/chat/completions", json={"model": BASE, **ASK})
    assert answer.status_code == 503
    assert "The model server does not answer" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]


def test_users_cannot_name_a_models_files(asking: Team, server: ModelServer) -> None:
    forged = {"base": {"id": "x", "prefix": "jobs/other", "manifest_sha256": "0"}, "tuned": None}
    answer = asking.http.post("/v1/chat/completions", json={"model": BASE, "tunery_model": forged, **ASK})
    assert answer.status_code == 200
    assert server.received[0]["tunery_model"]["base"]["id"] == BASE


def test_unknown_and_foreign_models_get_the_same_answer(
    asking: Team, make_team: Callable[..., Team], tuned: str, server: ModelServer
) -> None:
    other = make_team("beta").on(asking.http.app)  # type: ignore[arg-type]
    said = []
    for name in ("ft:none:tunery::a", tuned):
        with pytest.raises(openai.NotFoundError) as refused:
            other.openai().chat.completions.create(model=name, **ASK)
        said.append(refused.value.message.replace(name, "it"))
        assert refused.value.code == "model_not_found"
    assert said[0] == said[1]
    assert server.received == []
    assert asking.openai().chat.completions.create(model=tuned, **ASK)
