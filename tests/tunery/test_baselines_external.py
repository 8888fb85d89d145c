"""External endpoints: which addresses are allowed, what is sent to them, and what is reported if they fail."""

import json
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address

import pytest
from pydantic import SecretStr
from receiver import LOOPBACK, Receiver, answer

from tunery.baselines import external
from tunery.baselines.errors import EndpointRefused
from tunery.baselines.external import NoAnswer, Said
from tunery.baselines.order import External
from tunery.errors import InvalidValue, Unsupported
from tunery.settings import Settings

SECRET = SecretStr("sixteen characters and more")
ON = Settings(external_secret=SECRET)
CHAT = {"messages": [{"role": "user", "content": "q"}]}
PATH = "/v1/chat/completions"


def endpoint(url: str) -> External:
    return External(base_url=url, model="large")


def said(text: str | None, **message: object) -> bytes:
    body = {"choices": [{"message": {"content": text, **message}}], "usage": {"prompt_tokens": 9}}
    return json.dumps(body).encode()


def ask(receiver: Receiver, timeout: float = 5) -> Said:
    key = SecretStr("sk-very-secret")
    return external.ask(endpoint(f"{receiver.url}/v1/"), key, CHAT, limit=7, allow=LOOPBACK, timeout=timeout)


def test_the_operator_has_to_allow_them() -> None:
    with pytest.raises(Unsupported, match="TUNERY_EXTERNAL_SECRET"):
        external.check(endpoint("https://api.example.com/v1"), Settings())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://127.0.0.1/v1", "127.0.0.1"),
        ("https://169.254.169.254/latest", "169.254.169.254"),
        ("https://inner.example.com/v1", "10.1.2.3"),
        ("http://api.example.com/v1", "1.1.1.1"),
        ("https://api.example.com:22/v1", "1.1.1.1"),
    ],
)
def test_addresses_are_checked_as_those_of_webhooks(url: str, address: str) -> None:
    with pytest.raises(EndpointRefused, match="TUNERY_EXTERNAL_ALLOW") as refused:
        external.check(endpoint(url), ON, lambda host, port: [ip_address(address)])
    assert refused.value.param == "external.base_url"


def test_a_url_that_is_none_is_named_by_its_field() -> None:
    with pytest.raises(InvalidValue, match="An external endpoint's base_url must look like") as refused:
        external.check(endpoint("ftp://api.example.com"), ON)
    assert refused.value.param == "external.base_url"


def test_a_name_that_leads_elsewhere_later_is_not_asked() -> None:
    with pytest.raises(NoAnswer, match="not public"):
        external.ask(
            endpoint("https://api.example.com/v1"), None, CHAT, limit=1, allow=(),
            resolver=lambda host, port: [ip_address("127.0.0.1")],
        )  # fmt: skip


def test_a_key_is_read_with_the_secret_that_sealed_it_alone() -> None:
    sealed = external.seal(SecretStr("sk-very-secret"), SECRET)
    assert "very-secret" not in sealed
    assert external.unseal(sealed, SECRET).get_secret_value() == "sk-very-secret"
    with pytest.raises(NoAnswer, match="has changed"):
        external.unseal(sealed, SecretStr("another secret, as long as it"))


def test_it_is_asked_for_a_greedy_answer(receiver: Receiver) -> None:
    receiver.behaviours[PATH] = answer(200, said("a"))
    found = ask(receiver)
    assert (found.text, found.prompt_tokens, found.answer_tokens) == ("a", 9, None)
    [asked] = receiver.received
    assert json.loads(asked.body) == {"model": "large", "temperature": 0, "max_tokens": 7, **CHAT}
    assert asked.headers["authorization"] == "Bearer sk-very-secret"


def test_calls_are_read_as_the_scorecard_reads_them(receiver: Receiver) -> None:
    call = {"function": {"name": "pay", "arguments": '{"sum": 1}'}}
    receiver.behaviours[PATH] = answer(200, said(None, tool_calls=[call]))
    assert json.loads(ask(receiver).text) == {"name": "pay", "arguments": {"sum": 1}}


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, b"your key sk-very-secret is wrong", "check external.api_key"),
        (404, b"", "check external.base_url"),
        (302, b"", "status 302"),
        (200, b"<html>", "not a chat completion"),
        (200, b'{"choices": []}', "not a chat completion"),
        (200, said("a", tool_calls=[{"function": 1}]), "not a chat completion"),
    ],
)
def test_what_it_says_wrong_is_told_in_our_words(receiver: Receiver, status: int, body: bytes, why: str) -> None:
    receiver.behaviours[PATH] = answer(status, body, location="/v1/other")
    with pytest.raises(NoAnswer, match=why) as failure:
        ask(receiver)
    assert "very-secret" not in str(failure.value)
    assert len(receiver.received) == 1


def test_one_that_is_busy_is_asked_again(receiver: Receiver) -> None:
    busy, good = answer(429, retry_after="0"), answer(200, said("a"))
    receiver.behaviours[PATH] = lambda handler: (good if len(receiver.received) > 1 else busy)(handler)
    assert ask(receiver).text == "a"
    assert len(receiver.received) == 2


def test_one_that_hangs_is_cut_off(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "TRIES", 1)

    def hang(_: BaseHTTPRequestHandler) -> None:
        receiver.released.wait()

    receiver.behaviours[PATH] = hang
    with pytest.raises(NoAnswer, match=r"no answer within 0\.3 s"):
        ask(receiver, timeout=0.3)
    receiver.released.set()
