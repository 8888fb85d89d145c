"""Adapters that were trained elsewhere: how they are uploaded and shown."""

from collections.abc import Callable
from typing import Any

import pytest
import rows
from cloned_databases import Database
from fastapi import FastAPI
from teams import ALIAS, BASE, Team

from tunery.keys.model import Project
from tunery.models import imports, scores
from tunery.models.model import Model
from tunery.spec import Lora
from tunery.storage import open_storage

ROUTE = "/v1/models/adapters"


def send(team: Team, content: bytes = b"archive", **fields: str) -> Any:
    return team.http.post(ROUTE, data={"base": BASE, **fields}, files={"file": ("mine.zip", content)})


def ready(database: Database, name: str) -> None:
    """Marks the model as ready, as a worker does."""
    with database.sessions.begin() as session:
        technique = Lora(r=4, alpha=8, target_modules=["q_proj"])
        model = session.get_one(Model, name)
        imports.set_ready(session, model, manifest={"version": 1, "files": []}, sha256="3" * 64, technique=technique)


def test_an_adapter_becomes_a_model_of_the_project(team: Team, base: str, database: Database) -> None:
    model = send(team, suffix="mine", technique="qlora").json()

    assert model["id"].startswith(f"ft:{BASE}:tunery:mine:")
    shown = [model[name] for name in ("kind", "status", "base_model", "job", "technique", "source", "owned_by")]
    assert shown == ["tuned", "processing", BASE, None, "qlora", "mine.zip", "alpha"]
    with database.sessions() as session:
        assert imports.waiting(session) == [model["id"]]
        prefix = session.get_one(Model, model["id"]).prefix
    stored = b"".join(open_storage(database.settings).read(imports.archive_key(prefix)))
    assert stored == b"archive"
    assert team.http.get(f"/v1/models/{model['id']}").json() == model
    assert model["id"] not in [each["id"] for each in team.http.get("/v1/models").json()["data"]]
    chat = {"model": model["id"], "messages": [{"role": "user", "content": "q"}]}
    assert team.http.post("/v1/chat/completions", json=chat).json()["error"]["code"] == "wrong_state"


def test_an_alias_of_the_base_stays_in_its_name(team: Team, base: str) -> None:
    assert send(team, base=ALIAS).json()["id"].startswith(f"ft:{ALIAS}:tunery::")


def test_other_projects_do_not_see_it(
    team: Team, make_team: Callable[..., Team], base: str, database: Database
) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    other = make_team("beta")
    for answer in (
        other.http.get(f"/v1/models/{name}"),
        other.http.delete(f"/v1/models/{name}"),
        other.http.post(f"/v1/models/{name}/exports", json={"adapter_gguf": True}),
        send(other, base=name),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_what_cannot_be_sent_leaves_nothing(team: Team, base: str, database: Database, app: FastAPI) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    kept = sorted(open_storage(database.settings).list("models/"))
    for answer, status, param in (
        (send(team, base="none"), 404, "model"),
        (send(team, base=name), 400, "base"),
        (send(team, technique="full"), 400, "technique"),
        (team.http.post(ROUTE, files={"file": ("a.zip", b"x")}), 400, "base"),
        (team.http.post(ROUTE, data={"base": BASE}, files={}), 400, "file"),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert sorted(open_storage(database.settings).list("models/")) == kept


def test_an_archive_is_limited(make_app: Callable[..., FastAPI], make_team: Callable[..., Team], base: str) -> None:
    small = make_team("gamma", app=make_app(max_upload_bytes=10))
    assert send(small, b"x" * 11).status_code == 413


def test_a_deleted_one_waits_no_more(team: Team, base: str, database: Database) -> None:
    name = send(team).json()["id"]
    assert team.http.delete(f"/v1/models/{name}").json()["deleted"] is True
    with database.sessions() as session:
        assert imports.waiting(session) == []


@pytest.mark.parametrize("asked", [{"merged": True}, {"gguf": ["f16"]}, {"fp8": True}])
def test_its_merge_needs_rows_to_be_proven_on(
    team: Team, make_team: Callable[..., Team], base: str, database: Database, asked: dict[str, Any]
) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    with database.sessions.begin() as session:
        own = rows.file(session, session.get_one(Project, team.id)).id
        other = rows.file(session, session.get_one(Project, make_team("beta").id)).id
    route = f"/v1/models/{name}/exports"
    assert team.http.post(route, json=asked).json()["error"]["param"] == "rows_file"
    refused = team.http.post(route, json={**asked, "rows_file": other})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "rows_file")
    named = {"prompt": "Frage", "completion": "Antwort"}
    of_no_file = team.http.post(route, json={"adapter_gguf": True, "columns": named})
    assert of_no_file.json()["error"]["param"] == "columns"
    taken = team.http.post(route, json={**asked, "rows_file": own, "columns": named}).json()
    assert (taken["status"], taken["rows_file"], taken["columns"]["prompt"]) == ("queued", own, "Frage")


def test_a_job_on_it_keeps_its_shape(team: Team, base: str, database: Database) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    with database.sessions.begin() as session:
        file_id = rows.file(session, session.get_one(Project, team.id)).id
    body = {"model": name, "training_file": file_id}
    made = team.http.post("/v1/fine_tuning/jobs", json=body).json()
    assert made["technique"]["target_modules"] == ["q_proj"]
    assert (made["technique"]["r"], made["technique"]["alpha"]) == (4, 8)
    wrong = team.http.post("/v1/fine_tuning/jobs", json={**body, "technique": {"type": "lora", "r": 8}})
    assert wrong.json()["error"]["param"] == "technique.r"


def test_a_scorecard_is_made_without_training(team: Team, base: str, database: Database) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    with database.sessions.begin() as session:
        file_id = rows.file(session, session.get_one(Project, team.id)).id
    route = f"/v1/models/{name}/scorecards"
    assert team.http.get(route).json()["data"] == []

    named = {"prompt": "Frage", "completion": "Antwort"}
    body = {"evaluation": {"test_file": file_id, "max_rows": 3}, "columns": named}
    refused = team.http.post(route, json={**body, "columns": {"prompt": "Frage"}})
    assert refused.json()["error"]["param"] == "columns"
    asked = team.http.post(route, json=body).json()

    assert asked["columns"]["completion"] == "Antwort"
    assert (asked["status"], asked["evaluation"]["max_rows"], asked["scorecard"]) == ("queued", 3, None)
    assert team.http.get(route).json()["data"] == [asked]
    again = team.http.post(route, json={"evaluation": {"test_file": file_id}})
    assert again.json()["error"]["code"] == "wrong_state"
    with database.sessions.begin() as session:
        assert scores.waiting(session) == [name]
        scores.finish(session, name, scorecard={"rows": 3})
        assert scores.finish(session, name, scorecard={"rows": 4}) is None
    assert team.http.get(route).json()["data"][0]["scorecard"] == {"rows": 3}


@pytest.mark.parametrize(
    ("evaluation", "param"),
    [
        ({}, "evaluation.test_file"),
        ({"test_file": "file-none"}, "evaluation.test_file"),
        ({"test_file": "{file}", "task_rows": 4}, "evaluation.task_rows"),
        ({"test_file": "{file}", "every_steps": 4}, "evaluation.every_steps"),
        ({"test_file": "{file}", "unquantised": True}, "evaluation.unquantised"),
    ],
)
def test_scorecards_that_cannot_be(
    team: Team, base: str, database: Database, evaluation: dict[str, Any], param: str
) -> None:
    name = send(team).json()["id"]
    ready(database, name)
    with database.sessions.begin() as session:
        file_id = rows.file(session, session.get_one(Project, team.id)).id
    asked = {key: file_id if value == "{file}" else value for key, value in evaluation.items()}
    answer = team.http.post(f"/v1/models/{name}/scorecards", json={"evaluation": asked})
    assert answer.json()["error"]["param"] == param
    of_base = team.http.post(f"/v1/models/{base}/scorecards", json={"evaluation": {"test_file": file_id}})
    assert of_base.json()["error"]["param"] == "model"
