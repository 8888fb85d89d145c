"""What became of an endpoint's events."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import rows
from cloned_databases import Database
from receiver import LOOPBACK, Receiver, answer
from sqlalchemy import func, update
from teams import Team

from tunery.datasets import reports
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.webhooks import outbox
from tunery.webhooks.model import Delivery

ROOT = "/v1/webhook_endpoints"


@pytest.fixture
def deliver(database: Database) -> Callable[[], int]:
    """Makes every delivery due and sends it, as the I/O worker does."""

    def now() -> int:
        with database.sessions.begin() as session:
            past = func.clock_timestamp() - timedelta(seconds=1)
            session.execute(update(Delivery).where(Delivery.state == "pending").values(next_try_at=past))
        return outbox.deliver_due(database.settings.model_copy(update={"webhook_allow": LOOPBACK}))

    return now


def _create(team: Team, receiver: Receiver, path: str) -> str:
    types = ["fine_tuning.job.failed", "file.processed"]
    made = team.http.post(ROOT, json={"name": "ci", "url": receiver.url + path, "event_types": types}).json()
    assert made["last_delivery"] is None
    return str(made["id"])


def _end_job(team: Team, database: Database) -> str:
    with database.sessions.begin() as session:
        return rows.job(session, session.get_one(Project, team.id), State.FAILED).id


def _deliveries(team: Team, endpoint: str, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = team.http.get(f"{ROOT}/{endpoint}/deliveries", params=query).json()["data"]
    return found


def test_failed_tries_are_shown_until_one_succeeds(
    team: Team, database: Database, receiver: Receiver, deliver: Callable[[], int]
) -> None:
    endpoint = _create(team, receiver, "/hook")
    assert _deliveries(team, endpoint) == []
    job = _end_job(team, database)
    receiver.behaviours["/hook"] = answer(500)
    deliver()
    (found,) = _deliveries(team, endpoint)
    assert (found["object"], found["event_type"], found["data"]) == (
        "webhook_delivery",
        "fine_tuning.job.failed",
        {"id": job},
    )
    assert (found["status"], found["finished_at"]) == ("pending", None)
    assert found["next_try_at"] >= found["created_at"]
    assert [(one["status_code"], one["error"]) for one in found["tries"]] == [(500, "the receiver answered 500")]
    lasted = found["tries"][0]["seconds"]
    assert 0 < lasted < 15
    assert lasted == round(lasted, 3), "milliseconds, not the clock's every digit"
    assert found["id"] == receiver.received[0].headers["webhook-id"]
    assert team.http.get(f"{ROOT}/{endpoint}").json()["last_delivery"] == found

    receiver.behaviours["/hook"] = answer(204)
    deliver()
    (found,) = _deliveries(team, endpoint)
    assert (found["status"], found["next_try_at"]) == ("delivered", None)
    assert [one["status_code"] for one in found["tries"]] == [500, 204]
    (listed,) = team.http.get(ROOT).json()["data"]
    assert listed["last_delivery"] == found


def test_each_endpoint_shows_its_own_newest_event(
    team: Team, database: Database, receiver: Receiver, deliver: Callable[[], int]
) -> None:
    endpoints = [_create(team, receiver, path) for path in ("/a", "/b")]
    receiver.behaviours["/a"] = answer(410)
    jobs = [_end_job(team, database)]
    deliver()  # disables the first endpoint
    with database.sessions.begin() as session:
        file = rows.file(session, session.get_one(Project, team.id), sha256="a" * 64)
        summary = {"rows": 3, "findings": 2, "trainable": True, "reason": None}
        reports.finish(session, reports.request(session, file), summary=summary)
        jobs.append(file.id)
    deliver()
    shown = {one["id"]: one for one in team.http.get(ROOT).json()["data"]}
    first, second = (shown[endpoint] for endpoint in endpoints)
    assert first["disabled_reason"] == "The receiver answered 410 Gone."
    assert (first["last_delivery"]["status"], first["last_delivery"]["data"]["id"]) == ("failed", jobs[0])
    assert (second["last_delivery"]["event_type"], second["last_delivery"]["data"]["id"]) == ("file.processed", jobs[1])
    assert [one["data"]["id"] for one in _deliveries(team, endpoints[1])] == jobs[::-1]
    (newest,) = _deliveries(team, endpoints[1], limit=1)
    (older,) = _deliveries(team, endpoints[1], limit=1, after=newest["id"])
    assert [newest["data"]["id"], older["data"]["id"]] == jobs[::-1]


def test_receiver_that_is_not_there_is_told_from_one_that_refuses(
    team: Team, database: Database, receiver: Receiver, deliver: Callable[[], int]
) -> None:
    endpoint = _create(team, receiver, "/hook")
    team.http.post(f"{ROOT}/{endpoint}", json={"url": "http://127.0.0.1:1/hook"})
    _end_job(team, database)
    deliver()
    (only,) = _deliveries(team, endpoint)[0]["tries"]
    assert only["status_code"] is None
    assert only["error"]
