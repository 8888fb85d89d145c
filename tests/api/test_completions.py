"""Text completions through the official client, in front of a model server that records its requests."""

from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from model_server import ModelServer
from openai import OpenAI
from teams import ALIAS, BASE, Team


@pytest.fixture
def client(asking: Team) -> OpenAI:
    return asking.openai(strict=True)


def test_a_text_is_gone_on_from(client: OpenAI, server: ModelServer, team: Team) -> None:
    made = client.completions.create(model=ALIAS, prompt="Once", temperature=0, logprobs=1, user="me", echo=False)
    [choice] = made.choices
    assert (choice.text, choice.finish_reason, made.object) == ("a", "stop", "text_completion")
    assert made.id.startswith("cmpl-")
    assert choice.logprobs
    assert choice.logprobs.model_dump() == {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"a": -0.5}],
        "text_offset": [0],
    }
    [received] = server.received
    assert (received["tunery_text"], received["max_tokens"], received["top_logprobs"]) == ("Once", 16, 1)
    assert received["tunery_model"]["base"]["id"] == BASE
    assert received["tunery_model"]["project_id"] == team.id
    assert not received.keys() & {"prompt", "messages", "echo"}


def test_several_prompts_are_answered_in_order(client: OpenAI, server: ModelServer) -> None:
    made = client.completions.create(model=BASE, prompt=["one", "two", "three"])
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [received["tunery_text"] for received in server.received] == ["one", "two", "three"]
    assert made.usage
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (15, 6, 21)
    assert made.usage.prompt_tokens_details.cached_tokens == 9


def test_streams_of_several_prompts_follow_each_other(asking: Team) -> None:
    # Not strict: OpenAI's own chunks have a null `finish_reason` too, which the client's type does not allow.
    chunks = list(asking.openai().completions.create(model=BASE, prompt=["one", "two"], stream=True))
    assert [(chunk.choices[0].index, chunk.choices[0].text) for chunk in chunks] == [
        (0, "hel"), (0, "lo"), (1, "hel"), (1, "lo"),
    ]  # fmt: skip


def test_a_stream_that_breaks_says_so(asking: Team, server: ModelServer) -> None:
    server.breaks = True
    with pytest.raises(openai.APIError) as broken:
        list(asking.openai().completions.create(model=BASE, prompt="one", stream=True))
    assert broken.value.code == "unavailable"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": [1, 2]}, "prompt", "unsupported"),
        ({"prompt": [[1, 2], [3]]}, "prompt", "unsupported"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ["a", {}]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"prompt": "a", "echo": True}, "echo", "unsupported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "unsupported"),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "invalid_value"),
        ({"prompt": "a", "messages": []}, "messages", "invalid_value"),
        ({"prompt": "a", "tunery_text": "b"}, "tunery_text", "invalid_value"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value"),
        ({}, "prompt", "invalid_value"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    asking: Team, server: ModelServer, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = asking.http.post("/v1/completions", json={"model": BASE, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert server.received == []


def test_an_unknown_field_names_the_one_that_was_meant(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"supplied: max_token\. Did you mean 'max_tokens'\?"):
        client.completions.create(model=BASE, prompt="a", extra_body={"max_token": 1})


def test_the_servers_refusals_pass(client: OpenAI, server: ModelServer) -> None:
    server.status = 400
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASE, prompt="a", n=2)
    assert refused.value.param == "n"


def test_a_rate_ends_the_prompts(asking: Team, make_app: Callable[..., FastAPI], server: ModelServer) -> None:
    settings = asking.http.app.state.settings  # type: ignore[attr-defined]
    limited = asking.on(make_app(server_url=settings.server_url, requests_per_minute=1)).openai()
    with pytest.raises(openai.RateLimitError):
        limited.completions.create(model=BASE, prompt=["one", "two"])
    assert len(server.received) == 1
