"""Registering, naming and deleting models."""

import hashlib
import json
from typing import Any

import pytest
import rows
from cloned_databases import Database
from teams import ALIAS, BASE, SOURCE, Team

from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.artifacts.model import Artifact
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models import exports
from tunery.models.model import Model
from tunery.storage import open_storage


def test_a_base_as_listed(team: Team, base: str) -> None:
    model, alias = team.http.get("/v1/models").json()["data"]
    assert list(model)[:5] == ["id", "object", "created", "owned_by", "shutdown_date"]
    assert (model["id"], model["owned_by"], model["kind"]) == (BASE, "tunery", "base")
    assert (model["source"], model["aliases"], model["context_length"]) == (SOURCE, [ALIAS], 2048)
    assert model["base_model"] is None
    assert alias == {**model, "id": ALIAS, "base_model": BASE}


def test_models_by_any_name(team: Team, base: str) -> None:
    for name in (BASE, SOURCE, SOURCE.replace("/", "%2F")):
        shown = team.http.get(f"/v1/models/{name}").json()
        assert (shown["id"], shown["base_model"]) == (BASE, None)
    alias = team.http.get(f"/v1/models/{ALIAS}").json()
    assert (alias["id"], alias["base_model"], alias["kind"]) == (ALIAS, BASE, "base")
    answer = team.http.get("/v1/models/none/at/all")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_models_that_cannot_be_used_yet_are_listed_when_asked_for(team: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        rows.base(session, "late", status="processing")
        rows.base(session, "gone", status="error", deleted_at=rows.LONG_AGO)
    ready = [model["id"] for model in team.http.get("/v1/models").json()["data"]]
    listed = team.http.get("/v1/models", params={"status": "any"}).json()["data"]
    assert ready == [BASE, ALIAS]
    assert [(model["id"], model["status"]) for model in listed] == [
        ("late", "processing"),
        (BASE, "ready"),
        (ALIAS, "ready"),
    ]
    assert team.http.get("/v1/models", params={"status": "all"}).json()["error"]["param"] == "status"


def test_the_files_of_a_base(team: Team, base: str, database: Database) -> None:
    content = b"weights"
    sha256 = hashlib.sha256(content).hexdigest()
    open_storage(database.settings).put("models/x/deep/model.safetensors", content)
    with database.sessions.begin() as session:
        key = "models/x/deep/model.safetensors"
        session.add(Artifact(model_id=BASE, path="deep/model.safetensors", bytes=7, sha256=sha256, key=key))
    for name in (BASE, ALIAS):
        [file] = team.http.get(f"/v1/models/{name}/artifacts").json()["data"]
        assert file == {"object": "model.artifact", "path": "deep/model.safetensors", "bytes": 7, "sha256": sha256}
        answer = team.http.get(f"/v1/models/{name}/artifacts/{file['path']}")
        assert (answer.content, answer.headers["etag"]) == (content, f'"{sha256}"')
    missing = team.http.get(f"/v1/models/{BASE}/artifacts/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert team.http.get("/v1/models/none/artifacts").json()["error"]["code"] == "model_not_found"


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


def test_adding_a_base_with_a_chat_template(admin: Team, database: Database) -> None:
    template = "{% for m in messages %}{{ m.content }} é\n{% endfor %}"
    with database.sessions.begin() as session:
        rows.base(session, "late", status="error", manifest=None, manifest_sha256=None, chat_template="wrong")
    for id, body in (("new", {"chat_template": template}), ("late", {})):
        assert admin.http.post("/v1/models", json={"source": "org/m", "id": id, **body}).status_code == 200
    with database.sessions() as session:
        assert session.get_one(Model, "new").chat_template == template
        assert session.get_one(Model, "late").chat_template is None, "an earlier attempt's template is gone"
    for text in ("", "x" * (2**20 + 1)):
        refused = admin.http.post("/v1/models", json={"source": "org/m", "id": "other", "chat_template": text})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")


def test_where_a_base_lies_on_the_workers_disk_is_for_administrators(
    admin: Team, team: Team, database: Database
) -> None:
    path, reason = (
        "/srv/models/secret-project/tiny",
        "'/srv/models/secret-project/tiny' cannot be used as a base model: x",
    )
    with database.sessions.begin() as session:
        rows.base(session, "tiny", source=path, status="error", status_details=reason)
    shown, hidden = (by.http.get("/v1/models/tiny").json() for by in (admin, team))
    assert (shown["source"], shown["status_details"]) == (path, reason)
    assert hidden["source"] == "tiny"
    assert hidden["status"] == "error"
    assert "`GET /v1/models/tiny` shows the reason to administrators" in hidden["status_details"]
    assert "secret-project" not in str(hidden)
    with database.sessions.begin() as session:
        session.get_one(Model, "tiny").status = "ready"
    assert "secret-project" not in team.http.get("/v1/models").text


def test_the_id_of_a_deleted_base_stays_its_own(admin: Team, base: str, database: Database) -> None:
    """Models tuned from it refer to it by that id, which must never mean other weights."""
    assert admin.http.delete(f"/v1/models/{BASE}").json()["deleted"]
    answer = admin.http.post("/v1/models", json={"source": "org/other", "id": BASE})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")
    assert "deleted base" in answer.json()["error"]["message"]
    with database.sessions() as session:
        row = session.get_one(Model, BASE)
        assert (row.source, row.status) == (SOURCE, "ready")


@pytest.mark.parametrize("status", ["processing", "error"])
def test_an_id_that_never_became_a_model_is_free_again(status: str, admin: Team, database: Database) -> None:
    with database.sessions.begin() as session:
        rows.base(session, "late", status=status, manifest=None, manifest_sha256=None, model_info={})
    assert admin.http.delete("/v1/models/late").status_code == 200
    added = admin.http.post("/v1/models", json={"source": "org/other", "id": "late"}).json()
    assert (added["id"], added["status"], added["source"]) == ("late", "processing", "org/other")


def test_a_ready_base_is_found_before_one_that_failed(admin: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        values = {"manifest": None, "manifest_sha256": None, "created_at": rows.LONG_AGO}
        rows.base(session, "failed", source=SOURCE, status="error", **values)
    assert admin.http.get(f"/v1/models/{SOURCE}").json()["id"] == BASE


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


def test_deleting_an_alias_leaves_its_base(team: Team, admin: Team, base: str) -> None:
    assert team.http.delete(f"/v1/models/{ALIAS}").status_code == 403
    assert admin.http.delete(f"/v1/models/{ALIAS}").json() == {"id": ALIAS, "object": "model", "deleted": True}
    assert admin.http.get(f"/v1/models/{ALIAS}").status_code == 404
    assert admin.http.get(f"/v1/models/{BASE}").json()["aliases"] == []


def test_a_base_is_not_deleted_by_its_hub_id(admin: Team, base: str) -> None:
    answer = admin.http.delete(f"/v1/models/{SOURCE}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert f"To delete that base, use its id '{BASE}'" in answer.json()["error"]["message"]
    assert admin.http.get(f"/v1/models/{BASE}").status_code == 200


def test_the_aliases_of_a_deleted_base_are_free_again(admin: Team, base: str, database: Database) -> None:
    assert admin.http.delete(f"/v1/models/{BASE}").status_code == 200
    assert admin.http.post("/v1/models", json={"source": "org/other", "id": ALIAS}).json()["id"] == ALIAS


@pytest.fixture
def tuned(team: Team, base: str, database: Database) -> str:
    """The id of a model that one of the team's jobs made."""
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        job = rows.job(session, owner, State.SUCCEEDED, base_model=base)
        return str(job.tuned_model)


def test_exporting(team: Team, tuned: str, database: Database) -> None:
    route = f"/v1/models/{tuned}/exports"
    assert team.http.get(route).json()["data"] == []

    asked = team.http.post(route, json={"merged": True, "gguf": ["q8_0"]}).json()

    assert asked == {
        "object": "model.export",
        "model": tuned,
        "status": "queued",
        "asked": {"merged": True, "gguf": ["q8_0"], "fp8": False, "adapter_gguf": False},
        "rows_file": None,
        "columns": None,
        "results": [],
        "error": None,
    }
    assert team.http.get(route).json()["data"] == [asked]
    again = team.http.post(route, json={"merged": True})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "wrong_state")
    with database.sessions.begin() as session:
        exports.finish(session, tuned, results=[{"path": "merged", "message": "It differs", "is_refused": True}])
    assert team.http.get(route).json()["data"][0]["status"] == "failed"
    assert team.http.post(route, json={"gguf": ["f16"]}).json()["results"] == []


@pytest.mark.parametrize(
    ("technique", "body", "param"),
    [("lora", {}, "merged"), ("full", {"merged": True}, "merged"), ("full", {"adapter_gguf": True}, "adapter_gguf")],
)
def test_exports_that_cannot_be(
    team: Team, tuned: str, database: Database, technique: str, body: dict[str, Any], param: str
) -> None:
    with database.sessions.begin() as session:
        session.get_one(Model, tuned).technique = technique
    answer = team.http.post(f"/v1/models/{tuned}/exports", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_base_is_not_exported(team: Team, base: str) -> None:
    answer = team.http.post(f"/v1/models/{base}/exports", json={"gguf": ["f16"]})
    assert answer.status_code == 400
    assert "Name a fine-tuned model" in answer.json()["error"]["message"]


def test_engines_of_an_adapter(team: Team, base: str, database: Database) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, session.get_one(Project, team.id), base_model=base)
        rows.bring(session, job, State.SUCCEEDED)
        model = session.get_one(Model, job.tuned_model)
        files = tuple(ManifestFile(path=path, bytes=1, sha256="0" * 64) for path in ("adapter_config.json", "a.bin"))
        artifacts.record(session, model, Manifest(files=files))
    config = json.dumps({"r": 8, "rank_pattern": {"q_proj": 33}, "target_modules": ["q_proj"]}).encode()
    open_storage(database.settings).put(f"{model.prefix}/adapter_config.json", config)
    found = team.http.get(f"/v1/models/{model.id}/engines").json()["data"]
    assert [each["engine"] for each in found] == ["download", "peft", "vllm"]
    assert "--max-lora-rank 64 " in found[2]["command"]
