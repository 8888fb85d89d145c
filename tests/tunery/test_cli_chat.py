"""`tunery chat` and `tunery webhooks`, against a real API with a stand-in behind it."""

import io
import json
from collections.abc import Iterator

import pytest
import rows
from asgi import serving
from cloned_databases import Database
from commands import Run
from model_server import ModelServer
from receiver import LOOPBACK, Receiver, answer
from rich.console import Console
from teams import BASE

from api.main import create_app
from tunery.cli import comparing, output
from tunery.jobs.states import State
from tunery.keys import projects
from tunery.webhooks import outbox
from tunery.webhooks.model import WebhookEndpoint

# --- chat -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(database: Database, key: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """A stand-in for the model server, behind an API that the environment points to."""
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


def test_models_are_compared_side_by_side(tunery: Run, server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.message = {"content": "It is in the post, and should be with you within five working days."}
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is my card?\nAnd now?\n"))
    monkeypatch.setattr(output.console, "_width", 80)
    status, out, _ = tunery("chat", BASE, "--against", BASE, "-s", "Be brief.", "--max-tokens", 9)
    first, second = (part.splitlines() for part in out.split("> ")[1:])
    assert status == 0
    assert first[0] == "Where is my card?"
    assert first[2].split() == [BASE, "│", BASE]
    assert first[4].count("It is in the post, and") == 2
    assert first[-1] == "The answers are the same."
    assert second[0] == "And now?"
    assert all(len(line) <= 80 for line in first)
    assert len(server.received) == 4
    assert [message["role"] for message in server.received[3]["messages"]] == ["system", "user"]


def test_a_base_has_nothing_to_be_compared_with(tunery: Run, server: ModelServer) -> None:
    status, _, err = tunery("chat", BASE, "--compare", "-m", "Hi")
    assert status == 1
    assert "Name a second model" in err


def test_a_narrow_terminal_has_one_answer_under_the_other() -> None:
    answers = [
        {"model": name, "content": "long " * 9, "finish_reason": "length", "completion_tokens": 9} for name in "ab"
    ]
    narrow = Console(width=40, file=io.StringIO(), force_terminal=False)
    narrow.print(comparing.draw("Hi", {"answers": answers, "same": False}, width=40))
    lines = narrow.file.getvalue().splitlines()  # type: ignore[attr-defined]  # it is the StringIO above
    assert (lines[0], lines[1]) == ("> Hi", "a")
    assert "9 tokens, cut by the token limit" in lines
    assert lines.index("b") > lines.index("9 tokens, cut by the token limit")


def test_a_model_that_does_not_exist_is_suggested(tunery: Run, server: ModelServer) -> None:
    status, _, err = tunery("chat", BASE + "x", "-m", "Hi")
    assert status == 1
    assert f"Did you mean '{BASE}'?" in err


def test_requests_are_kept_rated_and_made_into_a_file(
    tunery: Run, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tunery("captures", "start", BASE, "--keep-days", 7)[1]
    assert started == f"✓ requests to {BASE} are captured and kept for 7 days\n"
    tunery("chat", BASE, "-m", "Hi")
    assert tunery("captures", "rate", "c", "bad", "--correction", "Hello!")[1] == "✓ c: bad, corrected\n"
    assert tunery("captures", "show", BASE)[1].split() == (
        ["kept", "for", "7", "days", "requests", "1", "good", "0", "bad", "1", "corrected", "1"]
    )
    assert tunery("captures", "list", BASE, "--rated", "bad")[1].split("\n")[1].split()[-6:] == (
        ["bad,", "should", "be:", "Hello!", "Hi", "hello"]
    )
    file = tunery("captures", "file", BASE)[1].strip()
    assert '"Hello!"' in tunery("files", "content", file)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    status, _, err = tunery("captures", "stop", BASE)
    assert status == 1
    assert f"Permanently delete 1 captured request to {BASE}, with their feedback? [y/N]:" in err
    assert tunery("captures", "stop", BASE, "--yes")[1] == f"✓ requests to {BASE} are no longer captured; deleted: 1\n"
    status, _, err = tunery("captures", "file", BASE)
    assert status == 1
    assert "No captured request" in err


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
        assert " all " in listed
        tunery("webhooks", "create", f"{receiver.url}/other", "--event", "fine_tuning.job.failed")
        (few,) = (line for line in tunery("webhooks", "list")[1].splitlines() if "/other" in line)
        assert few.split()[-2] == "failed"
        assert json.loads(tunery("webhooks", "show", endpoint)[1])["name"] == "ours"
        assert tunery("webhooks", "test", endpoint)[:2] == (0, "✓ the receiver answered 200\n")
        assert len(receiver.on("/hook")) == 1
        assert "No deliveries yet" in tunery("webhooks", "deliveries", endpoint)[2]
        with database.sessions.begin() as session:
            job = rows.job(session, projects.find_project(session, "default"), State.FAILED).id
        receiver.behaviours["/hook"] = answer(503)
        outbox.deliver_due(settings)
        outcome = "pending: the receiver answered 503 (1 try)"
        assert f"{outcome} (" in tunery("webhooks", "list")[1]
        listed = tunery("webhooks", "deliveries", endpoint)[1]
        assert job in listed
        assert outcome in listed
        assert json.loads(tunery("webhooks", "deliveries", endpoint, "--json")[1])[0]["tries"][0]["status_code"] == 503
        rotated = tunery("webhooks", "rotate", endpoint, "--keep-old")[1]
        assert rotated.startswith("whsec_")
        assert rotated != secret
        assert tunery("webhooks", "delete", endpoint, "--yes")[0] == 0
        status, _, err = tunery("webhooks", "show", endpoint)
        assert status == 1
        assert endpoint in err


@pytest.mark.parametrize("code", [302, 410, 500])
def test_a_test_event_that_the_receiver_does_not_accept_fails(
    tunery: Run, receiver: Receiver, database: Database, key: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    receiver.behaviours["/hook"] = answer(code)
    settings = database.settings.model_copy(update={"webhook_allow": LOOPBACK})
    with serving(create_app(settings)) as url:
        monkeypatch.setenv("TUNERY_API_URL", url)
        monkeypatch.setenv("TUNERY_API_KEY", key)
        endpoint = tunery("webhooks", "create", f"{receiver.url}/hook")[2].split()[0]
        status, out, err = tunery("webhooks", "test", endpoint)
        assert (status, out.startswith(f"✗ the receiver answered {code}"), err) == (1, True, "")
        with database.sessions.begin() as session:
            row = session.get_one(WebhookEndpoint, endpoint)
            row.disabled_at, row.disabled_reason = row.created_at, "The receiver answered 410 Gone."
        err = tunery("webhooks", "test", endpoint)[2]
        assert "is disabled" in err
        assert "410 Gone" in err
        assert f"tunery webhooks update {endpoint} --url URL" in err
        assert tunery("webhooks", "update", endpoint, "--name", "ours")[0] == 0
        assert json.loads(tunery("webhooks", "show", endpoint)[1])["disabled_reason"]
        changes = ("--url", f"{receiver.url}/new", "--event", "fine_tuning.job.failed")
        said = tunery("webhooks", "update", endpoint, *changes)[1]
        assert " ".join(said.split()) == (f"✓ {endpoint}, ours, receives fine_tuning.job.failed at {receiver.url}/new")
        assert json.loads(tunery("webhooks", "show", endpoint)[1])["disabled_reason"] is None
        status, _, err = tunery("webhooks", "update", endpoint)
        assert (status, "--url, --name or --event" in err) == (2, True)


def test_an_address_where_nothing_may_go(tunery: Run, api: str) -> None:
    status, out, err = tunery("webhooks", "create", "https://10.0.0.1/x")
    assert (status, out) == (1, "")
    assert "not public" in err
