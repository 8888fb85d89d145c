"""Erasing a project removes everything of it, and nothing of other projects."""

from datetime import timedelta

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, select

from tunery import ids
from tunery.artifacts import model as artifacts
from tunery.artifacts.manifest import Manifest, ManifestFile
from tunery.baselines import ledger
from tunery.baselines.order import Order
from tunery.datasets import reports
from tunery.datasets.model import FileCleaning, Upload, UploadPart
from tunery.db import Base
from tunery.errors import InvalidValue, NotFound
from tunery.jobs import leases
from tunery.jobs.model import Checkpoint, Job, Metric
from tunery.jobs.states import State
from tunery.keys import auth, projects
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.retention import projects as erasure
from tunery.retention.errors import ProjectBusy, WrongStorage
from tunery.storage import Storage, open_storage
from tunery.traffic import captures, usage
from tunery.traffic.model import CapturedFile, RequestRate
from tunery.webhooks import outbox
from tunery.webhooks.model import Delivery, DeliveryTry


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    return open_storage(request.getfixturevalue("settings" if request.param == "directory" else "s3_settings"))


def _furnish(database: Database, storage: Storage, name: str, base_id: str) -> str:
    """Makes a project with a row in every table that can have one, and the objects that these name. Returns its id."""
    with database.sessions.begin() as session:
        owner = rows.project(session, name)
        auth.create_key(session, owner, "key")
        endpoint = rows.endpoint(session, owner)
        job = rows.job(session, owner, State.SUCCEEDED, base_model=base_id)
        rows.job(session, owner, State.QUEUED, base_model=base_id)
        tuned = session.get_one(Model, job.tuned_model)
        artifacts.record(session, tuned, Manifest(files=(ManifestFile(path="weights", bytes=1, sha256="0" * 64),)))
        session.add(Checkpoint(id=ids.new(ids.CHECKPOINT), job_id=job.id, step=1, model_id=tuned.id))
        session.add(Metric(job_id=job.id, step=1, values={}))
        session.add(RequestRate(project_id=owner.id, requests_left=0, tokens_left=0, at=func.now()))
        capture = captures.start(session, owner.id, tuned, keep_days=1)
        captures.add(session, capture, ids.new(ids.COMPLETION), request={}, answer={}, finish_reason="stop")
        session.add(CapturedFile(file_id=job.training_file, model_id=tuned.id, order={}, outcome={}))
        usage.count(session, owner.id, tuned.id, usage.Tokens(1, 1))
        outbox.fan_out(session)
        delivery = session.scalars(select(Delivery).where(Delivery.endpoint_id == endpoint.id)).one()
        session.add(DeliveryTry(delivery_id=delivery.id, number=1))
        upload = Upload(
            id=ids.new(ids.UPLOAD),
            project_id=owner.id,
            purpose="fine-tune",
            filename="x",
            mime_type="text/plain",
            bytes=1,
            expires_at=func.clock_timestamp() + timedelta(hours=1),
        )
        session.add(upload)
        session.flush()
        part = UploadPart(id=ids.new(ids.PART), upload_id=upload.id, bytes=1, sha256="0" * 64, key="")
        part.key = f"uploads/{upload.id}/{part.id}"
        session.add(part)
        kept = rows.file(session, owner)
        session.add(FileCleaning(file_id=rows.file(session, owner).id, source_id=kept.id, order={}))
        report = reports.request(session, kept)
        baseline = ledger.request(session, owner.id, session.get_one(Model, base_id), kept, None, Order())
        reports.finish(session, report, summary={"rows": 1, "findings": 0, "trainable": True, "reason": None})
        keys = [
            kept.key,
            f"{report.prefix}/report.json",
            part.key,
            f"{baseline.prefix}/answers.jsonl",
            f"{tuned.prefix}/weights",
            f"jobs/{job.id}/logs/000001-000000",
        ]
        project_id = owner.id
    for key in keys:
        storage.put(key, b"x")
    return project_id


def _counts(database: Database) -> dict[str, int]:
    """The number of rows in each table, without bases: the jobs' factory adds one for each job."""
    with database.sessions.begin() as session:
        counts = {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in Base.metadata.tables.items()
        }
        counts["models"] -= session.scalar(select(func.count()).where(Model.kind == "base")) or 0
        return counts


def test_every_table_is_either_erased_or_shared() -> None:
    erased = {table.__tablename__ for table in erasure._owned("project")}
    assert erased | (erasure.SHARED & set(Base.metadata.tables)) == set(Base.metadata.tables)
    assert not erased & erasure.SHARED


def test_erasing_takes_all_of_one_project_and_nothing_of_another(database: Database, storage: Storage) -> None:
    with database.sessions.begin() as session:
        base = rows.base(session).id
    storage.put("models/base/weights", b"x")
    _furnish(database, storage, "other", base)
    rows_before, objects_before = _counts(database), sorted(storage.list(""))
    project_id = _furnish(database, storage, "doomed", base)
    with database.sessions.begin() as session:
        counts = erasure.contents(session, project_id)
        # It has a row in each table of its own except attempts, so that a forgotten table is noticed below.
        assert {table.__tablename__ for table in erasure._owned("")} - set(counts) == {"attempts"}
        erasure.check_storage(session, storage, project_id)
        erasure.close(session, erasure.find(session, "doomed"))

    assert erasure.erase(storage, project_id) == 6

    assert _counts(database) == rows_before
    assert sorted(storage.list("")) == objects_before
    with database.sessions.begin() as session, pytest.raises(NotFound):
        erasure.find(session, project_id)


def test_a_project_is_not_erased_while_a_worker_is_at_its_job(database: Database, storage: Storage) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, state=State.QUEUED)
        lease = rows.claim(session)
        assert lease
        erasure.close(session, session.get_one(Project, job.project_id))
        assert session.get_one(Job, job.id).state == State.CANCELLED
    storage.put(f"jobs/{job.id}/1/model/a", b"x")
    with pytest.raises(ProjectBusy):
        erasure.erase(storage, job.project_id)
    assert list(storage.list("jobs/"))
    with database.sessions.begin() as session:
        leases.end_attempt(session, lease, "dropped")
    assert erasure.erase(storage, job.project_id) == 1


def test_another_storage_than_the_projects_is_refused(database: Database, storage: Storage) -> None:
    with database.sessions.begin() as session:
        owner = rows.project(session)
        rows.file(session, owner)
        with pytest.raises(WrongStorage, match="None of the project's 1 files"):
            erasure.check_storage(session, storage, owner.id)


def test_a_name_means_the_live_project_and_then_the_only_revoked_one(database: Database) -> None:
    with database.sessions.begin() as session:
        first = rows.project(session, "team")
        projects.revoke_project(session, first)
        assert erasure.find(session, "team").id == first.id
        second = rows.project(session, "team")
        assert erasure.find(session, "team").id == second.id
        projects.revoke_project(session, second)
        with pytest.raises(InvalidValue, match="Use the id of one of them"):
            erasure.find(session, "team")
