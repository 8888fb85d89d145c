"""Records of ended jobs are removed once they are older than the setting for them; nothing else is."""

from datetime import timedelta
from pathlib import Path

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery import db
from tunery.jobs import ledger, queries
from tunery.jobs.model import Job, JobEvent, Metric
from tunery.jobs.states import FINAL, State
from tunery.keys.model import Project
from tunery.retention import history
from tunery.settings import Settings
from tunery.storage import Storage, open_storage
from tunery.webhooks import outbox
from tunery.webhooks.model import Delivery, DeliveryTry


@pytest.fixture
def storage(settings: Settings, tmp_path: Path) -> Storage:
    return open_storage(settings)


def _job(session: Session, storage: Storage, owner: Project, state: State, days: int, metrics: int = 5) -> Job:
    """Makes a job that ended `days` ago, with a warning, metrics and a log."""
    job = rows.job(session, owner, state)
    ledger.note(session, job.id, "a warning", level="warn")
    ledger.note(session, job.id, "Step 1/2", type="metrics")
    session.add_all(Metric(job_id=job.id, step=step, values={"train_loss": 1.0}) for step in range(metrics))
    storage.put(f"jobs/{job.id}/logs/000001-000000", b"a line\n")
    if state in FINAL:
        job.finished_at = func.clock_timestamp() - timedelta(days=days)
    session.flush()
    return job


def _left(database: Database, storage: Storage, job: Job) -> tuple[list[str], int, int]:
    """The texts of the events, the number of metrics and the number of the log's parts."""
    with database.sessions.begin() as session:
        events = select(JobEvent.message).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)
        metrics = session.scalar(select(func.count()).where(Metric.job_id == job.id))
        return list(session.scalars(events)), metrics or 0, len(list(storage.list(f"jobs/{job.id}/logs/")))


def test_records_of_old_jobs_go_in_batches_and_warnings_and_the_end_stay(
    database: Database, storage: Storage, settings: Settings
) -> None:
    with database.sessions.begin() as session:
        owner = rows.project(session)
        old = _job(session, storage, owner, State.SUCCEEDED, days=366)
        recent = _job(session, storage, owner, State.SUCCEEDED, days=89)
        live = _job(session, storage, owner, State.PAUSED, days=0)
        session.execute(update(Job).where(Job.id == live.id).values(created_at=rows.LONG_AGO))
    before = {job.id: _left(database, storage, job) for job in (recent, live)}

    assert not history.remove_old(settings, storage, rows=2)

    assert _left(database, storage, old) == (["ended", "a warning"], 0, 0)
    assert {job.id: _left(database, storage, job) for job in (recent, live)} == before
    with database.sessions.begin() as session:
        assert queries.warnings(session, [old.id]) == {old.id: ["a warning"]}
        assert sorted(session.get_one(Job, old.id).removed_records) == ["events", "logs", "metrics"]
        assert session.get_one(Job, recent.id).removed_records == []


def test_each_kind_of_record_has_a_time_of_its_own_and_zero_keeps_it(
    database: Database, storage: Storage, settings: Settings
) -> None:
    with database.sessions.begin() as session:
        job = _job(session, storage, rows.project(session), State.FAILED, days=5000)
    keeps = dict.fromkeys(("keep_events_days", "keep_metrics_days", "keep_logs_days", "keep_deliveries_days"), 0)
    before = _left(database, storage, job)
    history.remove_old(settings.model_copy(update=keeps), storage)
    assert _left(database, storage, job) == before
    history.remove_old(settings.model_copy(update=keeps | {"keep_metrics_days": 10}), storage)
    assert _left(database, storage, job) == (before[0], 0, 1)
    history.remove_old(settings.model_copy(update=keeps | {"keep_logs_days": 10}), storage)
    assert _left(database, storage, job) == (before[0], 0, 0)


def test_a_job_with_a_living_attempt_keeps_its_records(
    database: Database, storage: Storage, settings: Settings
) -> None:
    with database.sessions.begin() as session:
        job = rows.job(session, state=State.QUEUED)
        assert rows.claim(session)
        ledger.cancel(session, job.project_id, job.id)
        job.finished_at = rows.LONG_AGO
    before = _left(database, storage, job)
    history.remove_old(settings, storage)
    assert _left(database, storage, job) == before


def test_old_deliveries_go_with_their_tries_and_are_not_made_again(
    database: Database, storage: Storage, settings: Settings
) -> None:
    with database.sessions.begin() as session:
        owner = rows.project(session)
        rows.endpoint(session, owner)
        jobs = [rows.job(session, owner, State.SUCCEEDED) for _ in range(5)]
        assert outbox.fan_out(session) == 5
    old = func.clock_timestamp() - timedelta(days=31)
    with database.sessions.begin() as session:
        found = list(session.scalars(select(Delivery).order_by(Delivery.created_at)))
        session.add_all(DeliveryTry(delivery_id=delivery.id, number=1) for delivery in found)
        for delivery, state in zip(found[:3], ("delivered", "failed", "delivered"), strict=True):
            delivery.state, delivery.next_try_at, delivery.finished_at = state, None, old
        found[3].state, found[3].next_try_at, found[3].finished_at = "delivered", None, func.clock_timestamp()
        found[4].created_at = old  # pending

    assert history.remove_old(settings, storage, rows=2), "a third one is left"
    assert not history.remove_old(settings, storage, rows=2)

    with db.transaction() as session:
        assert set(session.scalars(select(Delivery.id))) == {found[3].id, found[4].id}
        assert set(session.scalars(select(DeliveryTry.delivery_id))) == {found[3].id, found[4].id}
        assert outbox.fan_out(session) == 0
        assert session.scalar(select(func.count()).select_from(Job)) == len(jobs)
