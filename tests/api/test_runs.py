"""Logs, measurements and artifacts of a job."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import rows
from databases import Database
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
from tunery.jobs.model import Metric
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model


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
    """A job whose model has two files."""
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


def test_artifacts_that_are_not_there(team: Team, finished: str, database: Database) -> None:
    route = f"/v1/fine_tuning/jobs/{finished}/artifacts"
    for path in ("none", "%2e%2e/%2e%2e/secret", "extra"):
        assert team.http.get(f"{route}/{path}").status_code == 404
    running = _job(database, team, State.RUNNING)
    assert team.http.get(f"/v1/fine_tuning/jobs/{running}/artifacts").json() == {"object": "list", "data": []}
