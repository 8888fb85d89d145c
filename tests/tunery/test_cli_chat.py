"""`tunery chat` and `tunery webhooks`, against a real API with a stand-in behind it."""

import io
import json
from collections.abc import Iterator

import pytest
import rows
from asgi import serving
from commands import Run
from databases import Database
from model_server import ModelServer
from receiver import LOOPBACK, Receiver
from teams import BASE

from api.main import create_app

# --- chat -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(database: Database, key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """The model server behind an API that the environment leads to."""
    stand_in = ModelServer()
    with database.sessions.begin() as session:
        rows.base(session, BASE)
    with serving(stand_in.app) as address:
        settings = database.settings.model_copy(update={"server_url": address})
        with serving(create_app(settings)) as url:
            monkeypatch.setenv("TUNERY_API_URL", url)
            monkeypatch.setenv("TUNERY_API_KEY", key)
            yield stand_in


def test_one_question(tunery: Run, server: ModelServer) -> None:
    assert tunery("chat", BASE, "--system", "Be brief.", "--message", "Hi") == (0, "hello\n", "")
    [asked] = server.received
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (asked["temperature"], asked["max_completion_tokens"], asked["stream"]) == (0, 512, True)


def test_a_conversation_goes_on_from_its_answers(
    tunery: Run, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd now?\n"))
    assert tunery("chat", BASE)[:2] == (0, "hello\nhello\n")
    assert [(m["role"], m["content"]) for m in server.received[1]["messages"]] == [
        ("user", "Hi"),
        ("assistant", "hello"),
        ("user", "And now?"),
    ]


def test_an_answer_that_breaks_off_is_an_error(tunery: Run, server: ModelServer) -> None:
    server.breaks = True
    status, out, err = tunery("chat", BASE, "-m", "Hi")
    assert (status, out) == (1, "hel")
    assert "Error: The model server" in err


def test_a_model_that_does_not_exist_is_suggested(tunery: Run, server: ModelServer) -> None:
    status, _, err = tunery("chat", BASE + "x", "-m", "Hi")
    assert status == 1
    assert f"Did you mean '{BASE}'?" in err


# --- webhooks -------------------------------------------------------------------------------------------------------


def test_an_endpoint_from_creation_to_deletion(
    tunery: Run, receiver: Receiver, database: Database, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = database.settings.model_copy(update={"webhook_allow": LOOPBACK})
    with serving(create_app(settings)) as url:
        monkeypatch.setenv("TUNERY_API_URL", url)
        monkeypatch.setenv("TUNERY_API_KEY", key)
        assert "No endpoints" in tunery("webhooks", "list")[2]
        status, secret, err = tunery("webhooks", "create", f"{receiver.url}/hook", "--name", "ours")
        assert (status, secret[:6]) == (0, "whsec_")
        endpoint = err.split()[0]
        listed = tunery("webhooks", "list")[1]
        assert endpoint in listed
        assert "succeeded, failed, cancelled" in listed
        assert json.loads(tunery("webhooks", "show", endpoint)[1])["name"] == "ours"
        assert tunery("webhooks", "test", endpoint)[:2] == (0, "✓ the receiver answered 200\n")
        assert len(receiver.on("/hook")) == 1
        rotated = tunery("webhooks", "rotate", endpoint, "--keep-old")[1]
        assert rotated.startswith("whsec_")
        assert rotated != secret
        assert tunery("webhooks", "delete", endpoint)[0] == 0
        status, _, err = tunery("webhooks", "show", endpoint)
        assert status == 1
        assert endpoint in err


def test_an_address_where_nothing_may_go(tunery: Run, api: str) -> None:
    status, out, err = tunery("webhooks", "create", "https://10.0.0.1/x")
    assert (status, out) == (1, "")
    assert "not public" in err
