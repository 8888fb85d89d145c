"""Logs, metrics and artifacts of a job."""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import rows
from cloned_databases import Database
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from teams import Team

from api.routes import runs
from tunery import processes
from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.jobs import ledger
from tunery.jobs.model import Job, Metric
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.storage import Directory


def _job(database: Database, team: Team, state: State) -> str:
    with database.sessions.begin() as session:
        return rows.job(session, session.get_one(Project, team.id), state).id


def _say(app: FastAPI, job: str, attempt: int, part: int, text: str) -> None:
    app.state.storage.put(f"jobs/{job}/logs/{attempt:06d}-{part:06d}", text.encode())


def test_a_log_is_its_chunks_in_order(app: FastAPI, team: Team, database: Database, base: str) -> None:
    job = _job(database, team, State.RUNNING)
    assert team.http.get(f"/v1/fine_tuning/jobs/{job}/logs").text == ""
    _say(app, job, 2, 1, "second\n")
    _say(app, job, 1, 2, "li")
    _say(app, job, 1, 10, "ne\n")
    _say(app, job, 1, 1, "first\n")
    answer = team.http.get(f"/v1/fine_tuning/jobs/{job}/logs")
    assert answer.text == "first\nline\nsecond\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    tails = {n: team.http.get(f"/v1/fine_tuning/jobs/{job}/logs?tail={n}").text for n in (0, 1, 2, 9)}
    assert tails == {0: "", 1: "second\n", 2: "line\nsecond\n", 9: "first\nline\nsecond\n"}


def test_a_followed_log_ends_with_its_job(
    app: FastAPI, live: str, team: Team, database: Database, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    job = _job(database, team, State.RUNNING)
    _say(app, job, 1, 1, "one\n")
    heard: list[str] = []
    first = threading.Event()

    def follow() -> None:
        url = f"{live}/v1/fine_tuning/jobs/{job}/logs?follow=true"
        with httpx2.stream("GET", url, headers={"authorization": f"Bearer {team.key}"}, trust_env=False) as stream:
            for text in stream.iter_text():
                heard.append(text)
                first.set()

    listener = threading.Thread(target=follow)
    listener.start()
    assert first.wait(20)
    assert heard == ["one\n"]
    pool = app.state.sessions.kw["bind"].pool
    assert processes.wait_until(lambda: pool.checkedout() == 0, seconds=20, every=0.001, alive=lambda: True), (
        "held between two looks"
    )
    _say(app, job, 1, 2, "two\n")
    with database.sessions.begin() as session:
        ledger.cancel(session, team.id, job)
    listener.join(20)
    assert not listener.is_alive()
    assert "".join(heard) == "one\ntwo\n"


@pytest.mark.parametrize("query", ["", "?tail=1", "?follow=true"])
def test_a_log_that_storage_does_not_give_is_an_error(
    query: str,
    make_app: Callable[..., FastAPI],
    serve: Callable[[Any], str],
    team: Team,
    database: Database,
    base: str,
) -> None:
    async def refuse(_: Request) -> Response:
        return Response(status_code=403)

    bucket = serve(Starlette(routes=[Route("/{key:path}", refuse)]))
    keys = {"aws_access_key_id": SecretStr("a"), "aws_secret_access_key": SecretStr("b")}
    client = team.on(make_app(storage_url="s3://bucket", s3_endpoint_url=bucket, **keys)).http
    answer = client.get(f"/v1/fine_tuning/jobs/{_job(database, team, State.RUNNING)}/logs{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_failed")


def test_metrics(team: Team, database: Database, base: str) -> None:
    job = _job(database, team, State.RUNNING)
    with database.sessions.begin() as session:
        for step in (3, 1, 2):
            session.add(Metric(job_id=job, step=step, values={"train_loss": 1 / step}))
    page = team.http.get(f"/v1/fine_tuning/jobs/{job}/metrics?limit=2").json()
    assert page == {
        "object": "list",
        "data": [{"step": 1, "train_loss": 1.0}, {"step": 2, "train_loss": 0.5}],
        "has_more": True,
    }
    rest = team.http.get(f"/v1/fine_tuning/jobs/{job}/metrics?after_step=2").json()
    assert ([row["step"] for row in rest["data"]], rest["has_more"]) == ([3], False)


@pytest.fixture
def finished(app: FastAPI, team: Team, database: Database, base: str) -> str:
    """The id of a job whose model has two files."""
    job = _job(database, team, State.SUCCEEDED)
    contents = {"adapter_model.safetensors": b"weights", "extra/notes.txt": b"n"}
    with database.sessions.begin() as session:
        model = session.query(Model).filter_by(job_id=job).one()
        files = []
        for path, data in contents.items():
            app.state.storage.put(f"{model.prefix}/{path}", data)
            files.append(ManifestFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
        artifacts.record(session, model, Manifest(files=tuple(files)))
    return job


def test_artifacts(team: Team, finished: str) -> None:
    route = f"/v1/fine_tuning/jobs/{finished}/artifacts"
    listed: list[dict[str, Any]] = team.http.get(route).json()["data"]
    assert [row["path"] for row in listed] == ["adapter_model.safetensors", "extra/notes.txt"]
    for row in listed:
        answer = team.http.get(f"{route}/{row['path']}")
        assert hashlib.sha256(answer.content).hexdigest() == row["sha256"] == answer.headers["etag"].strip('"')
        assert answer.headers["content-length"] == str(row["bytes"])


class _Reading(Directory):
    """A storage that records where reads begin and how many bytes are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.starts: list[int] = []
        self.bytes = 0

    def read(self, key: str, start: int = 0) -> Iterator[bytes]:
        self.starts.append(start)
        for position in itertools.count(start, 100):  # chunks that end anywhere in a line
            data = b"".join(super().read(key, position))[:100]
            if not data:
                return
            self.bytes += len(data)
            yield data


@pytest.fixture
def scored(app: FastAPI, team: Team, database: Database, base: str, tmp_path: Path) -> str:
    """The id of a job with 30 scored rows: of every three, one stays wrong, one is gained and one is lost."""
    job = _job(database, team, State.SUCCEEDED)
    lines = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": f"question {i}"}],
                "wanted": "ja\u2028\r",
                "base": "x",
                "tuned": "y" * i,
                "base_right": i % 3 == 2,
                "tuned_right": i % 3 == 1,
            },
            ensure_ascii=False,
        )
        for i in range(30)
    ]
    content = "".join(line + "\n" for line in lines).encode()
    app.state.storage = _Reading(tmp_path / "reading")
    with database.sessions.begin() as session:
        model = session.query(Model).filter_by(job_id=job).one()
        app.state.storage.put(f"{model.prefix}/answers.jsonl", content)
        listed = ManifestFile(path="answers.jsonl", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        artifacts.record(session, model, Manifest(files=(listed,)))
    return job


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("", lambda i: True),
        ("flipped=true", lambda i: i % 3 != 0),
        ("flipped=false", lambda i: i % 3 == 0),
        ("right=true", lambda i: i % 3 == 1),
        ("flipped=true&right=false", lambda i: i % 3 == 2),
    ],
)
def test_rows_of_a_scorecard_are_paged_in_order(
    team: Team, scored: str, query: str, kept: Callable[[int], bool]
) -> None:
    route, found, after = f"/v1/fine_tuning/jobs/{scored}/scorecard/rows?limit=4&{query}", [], ""
    while True:
        page = team.http.get(route + after).json()
        found += page["data"]
        assert page["last_id"] == page["data"][-1]["id"]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 4
        after = f"&after={page['last_id']}"

    numbers = [i for i in range(30) if kept(i)]
    assert [row["number"] for row in found] == [i + 1 for i in numbers]
    assert [row["messages"][0]["content"] for row in found] == [f"question {i}" for i in numbers]
    assert [row["tuned"] for row in found] == ["y" * i for i in numbers]
    assert [row["flipped"] for row in found] == [i % 3 != 0 for i in numbers]
    assert {row["wanted"] for row in found} == {"ja\u2028\r"}


def test_a_page_reads_no_more_than_its_rows(app: FastAPI, team: Team, scored: str) -> None:
    route = f"/v1/fine_tuning/jobs/{scored}/scorecard/rows"
    last = team.http.get(f"{route}?limit=20").json()["last_id"]
    start = int(last.rpartition("_")[2])
    storage = app.state.storage
    storage.starts, storage.bytes = [], 0

    assert [row["number"] for row in team.http.get(f"{route}?limit=2&after={last}").json()["data"]] == [21, 22]

    assert storage.starts == [start]
    assert storage.bytes < 5 * 250


def test_rows_of_a_withheld_model_show_why(team: Team, scored: str, database: Database) -> None:
    with database.sessions.begin() as session:
        session.get_one(Job, scored).gate = {"status": "failed", "withheld": True, "checks": []}

    assert team.http.get(f"/v1/fine_tuning/jobs/{scored}/artifacts").status_code == 404
    assert len(team.http.get(f"/v1/fine_tuning/jobs/{scored}/scorecard/rows").json()["data"]) == 20


def test_rows_after_none_and_of_none(team: Team, scored: str, database: Database) -> None:
    route = f"/v1/fine_tuning/jobs/{scored}/scorecard/rows"
    for forged in ("answer_1_7", "answer_2_999999", "answer_0_0", "answer_1_-1", "ftjob-1", "answer_1_13"):
        answer = team.http.get(f"{route}?after={forged}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after"), forged
    running = _job(database, team, State.RUNNING)
    page = team.http.get(f"/v1/fine_tuning/jobs/{running}/scorecard/rows").json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_artifacts_that_are_not_there(team: Team, finished: str, database: Database) -> None:
    route = f"/v1/fine_tuning/jobs/{finished}/artifacts"
    for path in ("none", "%2e%2e/%2e%2e/secret", "extra"):
        assert team.http.get(f"{route}/{path}").status_code == 404
    running = _job(database, team, State.RUNNING)
    assert team.http.get(f"/v1/fine_tuning/jobs/{running}/artifacts").json() == {"object": "list", "data": []}
