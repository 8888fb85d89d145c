"""Registering, naming and deleting models."""

from typing import Any

import rows
from databases import Database
from teams import ALIAS, BASE, SOURCE, Team

from tunery.jobs.states import State
from tunery.keys.model import Project


def test_a_base_as_listed(team: Team, base: str) -> None:
    [model] = team.http.get("/v1/models").json()["data"]
    assert list(model)[:5] == ["id", "object", "created", "owned_by", "shutdown_date"]
    assert (model["id"], model["owned_by"], model["kind"]) == (BASE, "tunery", "base")
    assert (model["source"], model["aliases"], model["context_length"]) == (SOURCE, [ALIAS], 2048)


def test_models_by_any_name(team: Team, base: str) -> None:
    for name in (BASE, ALIAS, SOURCE, SOURCE.replace("/", "%2F")):
        assert team.http.get(f"/v1/models/{name}").json()["id"] == BASE
    answer = team.http.get("/v1/models/none/at/all")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_adding_a_base(admin: Team, team: Team) -> None:
    added = admin.http.post("/v1/models", json={"source": "org/Some Model 1B"}).json()
    assert (added["id"], added["status"], added["source"]) == ("Some-Model-1B", "processing", "org/Some Model 1B")
    assert team.http.get("/v1/models").json()["data"] == []
    assert team.http.get("/v1/models/Some-Model-1B").json()["status"] == "processing"
    again = admin.http.post("/v1/models", json={"source": "org/Some Model 1B"})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "id")
    for name in ("a/b", "a:b", "..", ""):
        refused = admin.http.post("/v1/models", json={"source": "org/m", "id": name})
        assert refused.status_code == 400 or refused.json()["id"] == "m", name


def test_aliases(admin: Team, base: str) -> None:
    alias = admin.http.post("/v1/models/aliases", json={"alias": "gpt-4.1", "model": BASE}).json()
    assert alias == {"object": "model.alias", "alias": "gpt-4.1", "model": BASE}
    assert admin.http.get("/v1/models/gpt-4.1").json()["aliases"] == ["gpt-4.1", ALIAS]
    taken = admin.http.post("/v1/models/aliases", json={"alias": BASE, "model": BASE})
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "alias")


def test_deleting(team: Team, admin: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        tuned = str(rows.job(session, session.get_one(Project, team.id), State.SUCCEEDED).tuned_model)

    def delete(by: Team, name: str) -> Any:
        return by.http.delete(f"/v1/models/{name}")

    assert delete(admin, tuned).status_code == 404, "another project's, administrator or not"
    assert delete(team, base).status_code == 403
    assert delete(team, tuned).json() == {"id": tuned, "object": "model", "deleted": True}
    assert delete(team, tuned).status_code == 404
    assert delete(admin, base).json()["deleted"]
    assert team.http.get(f"/v1/models/{base}").status_code == 404
