"""Removes old records of ended jobs: events, metrics, logs and webhook deliveries."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import cast

from sqlalchemy import ColumnElement, CursorResult, Delete, delete, exists, func, select, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from tunery import db
from tunery.jobs.model import Attempt, Job, JobEvent, Metric
from tunery.settings import Settings
from tunery.storage import Storage
from tunery.traffic.model import CapturedRequest
from tunery.webhooks.model import Delivery, DeliveryTry

Transaction = Callable[[], AbstractContextManager[Session]]

ROWS = 2000
"""Rows of one transaction: each holds its locks for milliseconds."""
JOBS = 20
"""Jobs of one round, for each kind of record."""

_IS_REMOVABLE = (JobEvent.level != "warn") & JobEvent.outcome.is_(None)
# A job answers with its warnings for as long as it is stored, and deliveries refer to the event that ended it.


def remove_old(
    settings: Settings, storage: Storage, *, transaction: Transaction = db.transaction, rows: int = ROWS
) -> bool:
    """Removes one round of records that are older than their setting. Returns whether more may be left.

    Logs come last, so that a failing storage does not keep rows.
    """
    more = [
        _remove_deliveries(transaction, settings.keep_deliveries_days, rows),
        _remove_captured(transaction, rows),
        _remove(transaction, "events", settings.keep_events_days, lambda job: remove_events(transaction, job, rows)),
        _remove(transaction, "metrics", settings.keep_metrics_days, lambda job: remove_metrics(transaction, job, rows)),
        _remove(transaction, "logs", settings.keep_logs_days, lambda job: _logs(storage, job)),
    ]
    return any(more)


def _remove(transaction: Transaction, kind: str, days: int, remove: Callable[[str], None]) -> bool:
    """Removes one kind of record of some jobs and marks their rows, so that no job is visited twice.

    In random order, so that a job whose log cannot be deleted does not block the others.
    """
    if days == 0:
        return False
    lives = exists().where(Attempt.job_id == Job.id, Attempt.ended_at.is_(None))
    old = select(Job.id).where(_is_older(Job.finished_at, days), ~Job.removed_records.contains([kind]), ~lives)
    with transaction() as session:
        found = session.scalars(old.order_by(func.random()).limit(JOBS)).all()
    for job_id in found:
        remove(job_id)
        with transaction() as session:
            noted = func.array_append(Job.removed_records, kind)
            session.execute(update(Job).where(Job.id == job_id).values(removed_records=noted))
    return len(found) == JOBS


def _is_older(time: InstrumentedAttribute[object], days: int) -> ColumnElement[bool]:
    return time < func.clock_timestamp() - timedelta(days=days)


def remove_events(transaction: Transaction, job_id: str, rows: int) -> None:
    """Removes a job's events, `rows` in a transaction, except its warnings and its end."""
    chosen = select(JobEvent.seq).where(JobEvent.job_id == job_id, _IS_REMOVABLE).limit(rows)
    _in_batches(transaction, delete(JobEvent).where(JobEvent.seq.in_(chosen)), rows)


def remove_metrics(transaction: Transaction, job_id: str, rows: int) -> None:
    """Removes a job's measurements, `rows` in a transaction."""
    chosen = select(Metric.job_id, Metric.step).where(Metric.job_id == job_id).limit(rows)
    _in_batches(transaction, delete(Metric).where(tuple_(Metric.job_id, Metric.step).in_(chosen)), rows)


def _in_batches(transaction: Transaction, statement: Delete, rows: int) -> None:
    removed = rows
    while removed == rows:
        with transaction() as session:
            done = session.execute(statement.execution_options(synchronize_session=False))
            removed = cast(CursorResult[object], done).rowcount


def _logs(storage: Storage, job_id: str) -> None:
    for key in list(storage.list(f"jobs/{job_id}/logs/")):
        storage.delete(key)


def _remove_deliveries(transaction: Transaction, days: int, rows: int) -> bool:
    """Removes ended deliveries with their tries. The event stays marked as fanned out, so nothing is sent again."""
    if days == 0:
        return False
    old = select(Delivery.id).where(Delivery.state != "pending", _is_older(Delivery.finished_at, days))
    with transaction() as session:
        found = session.scalars(old.limit(rows).with_for_update(skip_locked=True)).all()
        session.execute(delete(DeliveryTry).where(DeliveryTry.delivery_id.in_(found)))
        session.execute(delete(Delivery).where(Delivery.id.in_(found)))
    return len(found) == rows


def _remove_captured(transaction: Transaction, rows: int) -> bool:
    """Removes expired captured requests."""
    over = select(CapturedRequest.id).where(CapturedRequest.expires_at <= func.clock_timestamp()).limit(rows)
    with transaction() as session:
        found = session.scalars(over.with_for_update(skip_locked=True)).all()
        session.execute(delete(CapturedRequest).where(CapturedRequest.id.in_(found)))
    return len(found) == rows
