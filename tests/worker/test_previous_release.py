"""A database of the previous release migrates with its jobs, and jobs that it left paused or queued are finished.

That release's own workers wrote `tests/data/previous_release`; its make.py says how.
"""

import tarfile
from pathlib import Path

import psycopg
import pytest
from cloned_databases import Database
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from workshop import QUICK, Workshop

from api.main import create_app
from tunery.artifacts import manifest
from tunery.jobs.model import HostDevice, Job, Metric
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.local import schema
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import open_storage

RELEASE = Path(__file__).parents[1] / "data" / "previous_release"


@pytest.fixture
def upgraded(database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Returns a workshop with the previous release's database and storage, migrated to this release's schema."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    dump = (RELEASE / "database.sql").read_text()
    with psycopg.connect(database.url.replace("+psycopg", "")) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        connection.execute(dump)
        assert connection.execute("SELECT version_num FROM public.alembic_version").fetchone() == ("0004",)
    with tarfile.open(RELEASE / "objects.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    schema.upgrade(database.url)
    with database.sessions.begin() as session:
        (project,) = session.scalars(select(Project))
    return Workshop(database, open_storage(settings), settings, tmp_path, project_id=project.id)


def by_state(workshop: Workshop) -> dict[str, str]:
    with workshop.session() as session:
        return {job.state: job.id for job in session.scalars(select(Job))}


def client_of(workshop: Workshop) -> TestClient:
    with workshop.session() as session:
        _, key = auth.create_key(session, session.get_one(Project, workshop.project_id), "test")
    return TestClient(create_app(workshop.database.settings), headers={"authorization": f"Bearer {key}"})


def model_of(workshop: Workshop, job_id: str) -> Model:
    with workshop.session() as session:
        found: Model = session.get_one(Model, session.get_one(Job, job_id).tuned_model)
        return found


@pytest.mark.slow
def test_previous_releases_jobs_go_on(upgraded: Workshop) -> None:
    jobs, client = by_state(upgraded), client_of(upgraded)
    assert set(jobs) == {"succeeded", "paused", "queued"}
    shown = {job["id"]: job for job in client.get("/v1/fine_tuning/jobs").json()["data"]}
    assert {shown[id]["status"] for id in jobs.values()} == {"succeeded", "paused", "queued"}
    with upgraded.session() as session:
        assert [device.device for device in session.scalars(select(HostDevice))] == ["CPU"]
        assert session.execute(text("SELECT device FROM slots")).scalar() == "CPU", "the previous release reads it"
    old = model_of(upgraded, jobs["succeeded"])
    assert manifest.load(upgraded.storage, old.prefix, str(old.manifest_sha256)).files

    assert client.post(f"/v1/fine_tuning/jobs/{jobs['paused']}/resume").status_code == 200
    upgraded.start("io")
    upgraded.start("train")
    try:
        ended = {state: upgraded.until_state(jobs[state], "succeeded", seconds=240) for state in ("queued", "paused")}
    finally:
        upgraded.stop()

    assert [ended[state].step for state in ("queued", "paused")] == [3, 240]
    assert "Resumed from step 20/240" in upgraded.story(jobs["paused"])
    with upgraded.session() as session:
        steps = select(Metric.step).where(Metric.job_id == jobs["paused"]).order_by(Metric.step)
        assert list(session.scalars(steps)) == list(range(1, 241))
    for state in ("queued", "paused"):
        model = model_of(upgraded, jobs[state])
        assert model.status == "ready"
        assert manifest.load(upgraded.storage, model.prefix, str(model.manifest_sha256)).files


def test_previous_releases_database_becomes_that_of_this_release(upgraded: Workshop) -> None:
    """Tables that were migrated with their rows are the same as those of an empty database."""
    schema.compare(upgraded.database.url)
