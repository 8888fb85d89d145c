"""Requests that Schemathesis generates from the API's own document, with two projects' keys: no 5xx, no response that
the document does not describe, and nothing of the other project.

Schemathesis has its own venv: as a pytest plug-in it would load into every run, and it pins packages that .venv needs.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_clients
import pytest
import rows
import templates
from cloned_databases import Database
from fastapi import FastAPI
from model_server import ModelServer
from sqlalchemy import select
from teams import LINE, Team

from tunery.artifacts import manifest
from tunery.artifacts.model import Artifact
from tunery.datasets.model import File
from tunery.jobs import ledger
from tunery.jobs.model import Checkpoint
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.storage import open_storage
from tunery.webhooks import endpoints

HOOKS = Path(__file__).parents[1] / "fixtures/schemathesis_hooks.py"
MARKER = "alphas-own-text"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def ids(team: Team, database: Database, base: str, tmp_path: Path) -> dict[str, list[str]]:
    """Ids of the first project's objects, one or more of each kind, by parameter; every text contains the marker."""
    line = LINE.replace("q", MARKER) * 12
    file = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (f"{MARKER}.jsonl", line)}).json()
    upload = team.http.post(
        "/v1/uploads", json={"bytes": 1, "filename": MARKER, "mime_type": "t", "purpose": "user_data"}
    ).json()
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        values: dict[str, Any] = {"base_model": base, "training_file": file["id"], "user_metadata": {"k": MARKER}}
        jobs = [rows.job(session, owner, state, **values) for state in (State.SUCCEEDED, State.CANCELLED)]
        for job in jobs:
            ledger.note(session, job.id, MARKER)
        made = jobs[0]
        model = str(made.tuned_model)
        session.add(Checkpoint(id=f"ftckpt_{made.id}", job_id=made.id, step=1, model_id=model))
        storage = open_storage(database.settings)
        for row in session.scalars(select(File).where(File.project_id == owner.id, File.id != file["id"])):
            storage.put(row.key, MARKER.encode())  # the factory makes only rows
        folder = templates.model_folder(tmp_path / "base", templates.CHATML)
        (folder / "model.safetensors").write_bytes(b"weights")
        registered = session.get_one(Model, base)
        _, registered.manifest_sha256 = manifest.publish(storage, registered.prefix, folder)
        stored = storage.put(f"jobs/{made.id}/1/a", MARKER.encode())
        session.add(Artifact(model_id=model, path="a", bytes=stored.bytes, sha256=stored.sha256, key=stored.key))
        storage.put(f"jobs/{made.id}/logs/000001-000000", MARKER.encode())
        hook = endpoints.create(
            session, owner.id, name=MARKER, url="https://1.1.1.1/", event_types=["fine_tuning.job.failed"], allow=()
        )
        return {
            "file_id": [file["id"]],
            "upload_id": [upload["id"]],
            "job_id": [job.id for job in jobs],
            "model": [model],
            "path": ["a"],
            "endpoint_id": [hook.id],
        }


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["own", "foreign"])
def test_no_request_breaks_the_document(
    whose: str,
    team: Team,
    make_team: Callable[..., Team],
    make_app: Callable[..., FastAPI],
    serve: Callable[[Any], str],
    base: str,
    ids: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    schemathesis = other_clients.install("schemathesis") / "bin/schemathesis"
    address = serve(make_app(server_url=serve(ModelServer().app)))
    caller = team if whose == "own" else make_team("beta")
    foreign = [id for kind, named in ids.items() if kind != "path" for id in named] if whose == "foreign" else []
    given = {"ids": {**ids, "model": [*ids["model"], base]}, "foreign": foreign}
    given["marker"] = MARKER if whose == "foreign" else "no such text"  # type: ignore[assignment]
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [
        schemathesis, "run", f"{address}/openapi.json", "--header", f"authorization: Bearer {caller.key}",
        "--checks", f"{CHECKS},no_foreign_object", "--phases", "examples,coverage,fuzzing", "--max-time", "50",
        "--exclude-operation-id", "test_webhook_endpoint",  # would post to a generated address
        "--request-timeout", "20", "--seed", "1", "--no-shrink", "--continue-on-failure", "--no-color",
        # One worker: Python 3.11's ast module counts the recursion depth of all threads together, and fails.
        "--suppress-health-check", "all", "--workers", "1",
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SCHEMATHESIS_HOOKS": str(HOOKS)}
    environment["TUNERY_FUZZ"] = str(tmp_path / "given.json")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
