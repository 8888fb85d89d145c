"""Captured requests: off by default, stored without personal data, rated, corrected and made into training files."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import openai
import pytest
from cloned_databases import Database
from model_server import ModelServer
from sqlalchemy import func, select, update
from teams import BASE, Team

from api.capturing import LONGEST
from tunery.retention import history
from tunery.storage import open_storage
from tunery.traffic.model import CapturedRequest

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "I am ann@example.com. Where is my card?"}]}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"n": 3}'}}
TOOL: Any = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def post(team: Team, path: str, expect: int = 200, **body: Any) -> dict[str, Any]:
    answer = team.http.post(f"/v1{path}", json=body)
    assert answer.status_code == expect, answer.text
    return dict(answer.json())


def captured(database: Database) -> list[CapturedRequest]:
    with database.sessions() as session:
        return list(session.scalars(select(CapturedRequest).order_by(CapturedRequest.created_at)))


def test_nothing_is_kept_unless_it_is_asked_for(asking: Team, tuned: str, database: Database) -> None:
    post(asking, f"/models/{tuned}/capture")
    asking.openai().chat.completions.create(model=BASE, **ASK)
    assert captured(database) == []
    assert asking.http.get(f"/v1/models/{BASE}/capture").json()["enabled"] is False


def test_personal_data_is_replaced_before_it_is_stored(
    asking: Team, tuned: str, server: ModelServer, database: Database
) -> None:
    server.message = {"content": "Call +1 202-555-0143, Ann."}
    post(asking, f"/models/{tuned}/capture", keep_days=7)
    made = asking.openai().chat.completions.create(model=tuned, **ASK)
    assert made.choices[0].message.content == "Call +1 202-555-0143, Ann.", "the caller's own answer is whole"
    [row] = captured(database)
    assert (row.id, row.model_id) == (made.id, tuned)
    assert row.request == {"messages": [{"role": "user", "content": "I am <EMAIL_ADDRESS>. Where is my card?"}]}
    assert row.answer == {"role": "assistant", "content": "Call <PHONE_NUMBER>, Ann."}
    assert row.expires_at - row.created_at == pytest.approx(timedelta(days=7), abs=timedelta(minutes=1))


def test_streams_calls_and_responses_are_kept_whole(
    asking: Team, tuned: str, server: ModelServer, database: Database
) -> None:
    post(asking, f"/models/{tuned}/capture")
    client = asking.openai()
    server.deltas = [{"content": "hel"}, {"content": "lo"}, {"tool_calls": [{"index": 0, **CALL}]}]
    list(client.chat.completions.create(model=tuned, stream=True, tools=[TOOL], **ASK))
    server.deltas, server.message = [{"content": "x"}], {"content": None, "tool_calls": [CALL]}
    with database.sessions.begin() as session:  # the stand-in gives every answer the same id
        session.execute(update(CapturedRequest).values(id="first"))
    made = client.responses.create(model=tuned, input="q")
    streamed, whole = captured(database)
    assert streamed.answer == {"role": "assistant", "content": "hello", "tool_calls": [CALL]}
    assert streamed.request["tools"] == [TOOL]
    assert whole.answer == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert whole.id == made.id
    assert whole.id.startswith("resp_")


def test_an_answer_that_breaks_off_and_a_text_are_not_kept(
    asking: Team, tuned: str, server: ModelServer, database: Database
) -> None:
    post(asking, f"/models/{tuned}/capture")
    asking.openai().completions.create(model=tuned, prompt="Once")
    server.breaks = True
    with pytest.raises(openai.APIError):
        list(asking.openai().chat.completions.create(model=tuned, stream=True, **ASK))
    assert captured(database) == []


@pytest.mark.parametrize(("length", "count"), [(LONGEST - 500, 1), (LONGEST, 0)])
def test_a_request_that_takes_long_to_redact_is_not_kept(
    asking: Team, tuned: str, database: Database, length: int, count: int
) -> None:
    post(asking, f"/models/{tuned}/capture")
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "a" * length}]}
    asking.openai().chat.completions.create(model=tuned, **asked)
    assert len(captured(database)) == count


@pytest.fixture
def kept(asking: Team, tuned: str, database: Database) -> str:
    """The tuned model, with five captured answers: rated good, bad, corrected, unrated, and cut at the token limit."""
    post(asking, f"/models/{tuned}/capture")
    with database.sessions.begin() as session:
        for place, (id, reason) in enumerate(
            (("good", "stop"), ("bad", "stop"), ("wrong", "stop"), ("plain", "stop"), ("cut", "length"))
        ):
            session.add(
                CapturedRequest(
                    id=id,
                    project_id=asking.id,
                    model_id=tuned,
                    request={"messages": [{"role": "user", "content": id}]},
                    answer={"role": "assistant", "content": "a"},
                    finish_reason=reason,
                    created_at=func.clock_timestamp() + timedelta(seconds=place),
                    expires_at=func.clock_timestamp() + timedelta(days=1),
                )
            )
    post(asking, "/feedback", id="good", rating="good")
    post(asking, "/feedback", id="bad", rating="bad")
    said = post(asking, "/feedback", id="wrong", rating="bad", correction="b, says bob@example.com")
    assert said == {
        "object": "feedback",
        "id": "wrong",
        "model": tuned,
        "rating": "bad",
        "correction": {"role": "assistant", "content": "b, says <EMAIL_ADDRESS>"},
    }
    return tuned


def content(team: Team, file: dict[str, Any]) -> list[dict[str, Any]]:
    text = team.http.get(f"/v1/files/{file['id']}/content").text
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_to_train_on_has_its_lineage(asking: Team, kept: str) -> None:
    file = post(asking, f"/models/{kept}/capture/files")
    assert (file["purpose"], file["status"]) == ("fine-tune", "processed")
    correct = {"role": "assistant", "content": "b, says <EMAIL_ADDRESS>"}
    assert content(asking, file) == [
        {"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "wrong"}, correct]},
    ]
    lineage = asking.http.get(f"/v1/files/{file['id']}/capture").json()
    assert (lineage["model"], lineage["rows"], lineage["requests"]) == (kept, 2, ["good", "wrong"])
    assert lineage["manifest_sha256"] == "2" * 64
    job = asking.http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file["id"]})
    assert job.status_code == 200, "it can be trained on"


def test_unrated_answers_and_preferences(asking: Team, kept: str) -> None:
    file = post(asking, f"/models/{kept}/capture/files", answers=["unrated"], filename="plain.jsonl")
    assert [row["messages"][0]["content"] for row in content(asking, file)] == ["plain"]
    assert file["filename"] == "plain.jsonl"
    pairs = post(asking, f"/models/{kept}/capture/files", format="preference")
    assert content(asking, pairs) == [
        {
            "input": {"messages": [{"role": "user", "content": "wrong"}]},
            "preferred_output": [{"role": "assistant", "content": "b, says <EMAIL_ADDRESS>"}],
            "non_preferred_output": [{"role": "assistant", "content": "a"}],
        }
    ]


@pytest.mark.parametrize(
    ("rated", "ids"),
    [
        ("", ["cut", "plain", "wrong", "bad", "good"]),
        ("good", ["good"]),
        ("bad", ["wrong", "bad"]),
        ("corrected", ["wrong"]),
        ("unrated", ["cut", "plain"]),
    ],
)
def test_requests_are_listed_by_what_was_said_of_them(asking: Team, kept: str, rated: str, ids: list[str]) -> None:
    query = f"?rated={rated}" if rated else ""
    page = asking.http.get(f"/v1/models/{kept}/capture/requests{query}").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ids, False)


def test_a_listed_request_has_its_answer_and_feedback_and_pages_go_on(asking: Team, kept: str) -> None:
    path = f"/v1/models/{kept}/capture/requests"
    page = asking.http.get(f"{path}?limit=3").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (["cut", "plain", "wrong"], True)
    wrong = page["data"][-1]
    assert (wrong["messages"], wrong["answer"]["content"]) == ([{"role": "user", "content": "wrong"}], "a")
    assert (wrong["rating"], wrong["correction"]["content"]) == ("bad", "b, says <EMAIL_ADDRESS>")
    assert (wrong["model"], wrong["finish_reason"], wrong["tools"]) == (kept, "stop", None)
    rest = asking.http.get(f"{path}?after=wrong").json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["bad", "good"], False)
    assert asking.http.get(f"{path}?after=nothing").json()["error"]["param"] == "after"


def test_what_is_counted_and_removed(asking: Team, kept: str, database: Database) -> None:
    found = asking.http.get(f"/v1/models/{kept}/capture").json()
    assert [found[name] for name in ("enabled", "keep_days", "requests", "good", "bad", "corrected")] == [
        True, 30, 5, 1, 2, 1,
    ]  # fmt: skip
    assert asking.http.delete(f"/v1/models/{kept}/capture").json()["removed"] == 5
    assert captured(database) == []
    error = post(asking, f"/models/{kept}/capture/files", 400)["error"]
    assert (error["code"], f"`GET /v1/models/{kept}/capture`" in error["message"]) == ("nothing_captured", True)
    objects = open_storage(database.settings).list("files/")
    assert list(objects) == [], "a file without rows leaves no bytes"


def test_requests_go_when_their_time_is_over(asking: Team, kept: str, database: Database) -> None:
    with database.sessions.begin() as session:
        over = update(CapturedRequest).where(CapturedRequest.id.in_(["good", "bad"]))
        session.execute(over.values(expires_at=func.clock_timestamp()))
    file = post(asking, f"/models/{kept}/capture/files")
    assert [row["messages"][0]["content"] for row in content(asking, file)] == ["wrong"]
    listed = asking.http.get(f"/v1/models/{kept}/capture/requests").json()["data"]
    assert [one["id"] for one in listed] == ["cut", "plain", "wrong"]
    found = asking.http.get(f"/v1/models/{kept}/capture").json()
    assert [found[name] for name in ("requests", "good", "bad", "corrected")] == [3, 0, 1, 1], "as they are listed"
    assert post(asking, "/feedback", 404, id="good", rating="bad")["error"]["param"] == "id"
    history.remove_old(database.settings, open_storage(database.settings), transaction=database.sessions.begin)
    assert [row.id for row in captured(database)] == ["wrong", "plain", "cut"]


def test_another_project_keeps_and_rates_its_own(
    asking: Team, kept: str, make_team: Callable[..., Team], database: Database
) -> None:
    other = make_team("beta").on(asking.http.app)  # type: ignore[arg-type]
    post(other, "/feedback", 404, id="good", rating="bad")
    post(asking, f"/models/{BASE}/capture")
    other.openai().chat.completions.create(model=BASE, **ASK)
    assert len(captured(database)) == 5
    assert other.http.get(f"/v1/models/{BASE}/capture").json()["requests"] == 0
    asking.openai().chat.completions.create(model=BASE, **ASK)
    assert [len(team.http.get(f"/v1/models/{BASE}/capture/requests").json()["data"]) for team in (asking, other)] == [
        1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "good"}, "rating"),
        ({"id": "good", "rating": "great"}, "rating"),
        ({"id": "good", "correction": {"role": "user", "content": "x"}}, "correction"),
        ({"rating": "good"}, "id"),
    ],
)
def test_feedback_that_says_nothing(asking: Team, body: dict[str, Any], param: str) -> None:
    assert post(asking, "/feedback", 400, **body)["error"]["param"] == param
