"""Erases a project: its rows and its objects, and nothing of other projects."""

from sqlalchemy import ColumnElement, Select, delete, func, select, update
from sqlalchemy.orm import Session

from tunery import db
from tunery.artifacts.model import Artifact
from tunery.baselines import ledger as baselines
from tunery.baselines.model import Baseline
from tunery.datasets.model import File, FileCleaning, FileEvent, FileReport, Upload, UploadPart
from tunery.db import Base
from tunery.errors import InvalidValue, NotFound
from tunery.jobs import ledger
from tunery.jobs.model import Attempt, Checkpoint, Job, JobEvent, Metric
from tunery.jobs.states import LIVE
from tunery.keys import projects
from tunery.keys.model import Key, Project
from tunery.models.model import Model
from tunery.retention import history
from tunery.retention.errors import ProjectBusy, WrongStorage
from tunery.retention.history import ROWS, Transaction
from tunery.storage import Storage
from tunery.traffic.model import Capture, CapturedFile, CapturedRequest, ModelUsage, RequestRate
from tunery.webhooks.model import Delivery, DeliveryTry, WebhookEndpoint

SHARED = frozenset({"model_aliases", "slots", "devices"})
"""Tables whose rows belong to no project. Bases, in `models`, belong to none either."""


def find(session: Session, name_or_id: str) -> Project:
    """Returns a project, the live one of that name before a revoked one. Raises NotFound, InvalidValue."""
    named = select(Project).where((Project.name == name_or_id) | (Project.id == name_or_id))
    found = list(session.scalars(named.order_by(Project.revoked_at.is_not(None))))
    if not found:
        raise NotFound(kind="project", id=name_or_id)
    if len(found) > 1 and found[0].revoked_at is not None:
        listed = ", ".join(project.id for project in found)
        raise InvalidValue(
            reason=f"Several revoked projects have the name '{name_or_id}'. Use the id of one of them: {listed}"
        )
    return found[0]


def contents(session: Session, project_id: str) -> dict[str, int]:
    """Returns the number of the project's rows by table, in the order in which they are deleted."""
    counts = {
        table.__tablename__: session.scalar(select(func.count()).select_from(table).where(condition)) or 0
        for table, condition in _owned(project_id).items()
    }
    return {name: count for name, count in counts.items() if count}


def close(session: Session, project: Project) -> None:
    """Revokes its keys, stops its webhooks and cancels its live jobs, so that nothing new arrives."""
    projects.revoke_project(session, project)
    endpoints = update(WebhookEndpoint).where(WebhookEndpoint.project_id == project.id)
    session.execute(endpoints.where(WebhookEndpoint.deleted_at.is_(None)).values(deleted_at=func.clock_timestamp()))
    for job_id in session.scalars(select(Job.id).where(Job.project_id == project.id, Job.state.in_(LIVE))).all():
        ledger.cancel(session, project.id, job_id)
    baselines.cancel_all(session, project.id)


def live_attempts(session: Session, project_id: str) -> int:
    """Returns the number of the project's live attempts, which may still store something."""
    jobs = select(Job.id).where(Job.project_id == project_id)
    return session.scalar(select(func.count()).where(Attempt.job_id.in_(jobs), Attempt.ended_at.is_(None))) or 0


def check_storage(session: Session, storage: Storage, project_id: str) -> None:
    """Raises WrongStorage if none of the project's files is in the storage, which must then be the wrong one."""
    keys = session.scalars(select(File.key).where(File.project_id == project_id, File.purged_at.is_(None))).all()
    if keys and all(storage.stat(key) is None for key in keys):
        raise WrongStorage(files=len(keys))


def erase(storage: Storage, project_id: str, *, transaction: Transaction = db.transaction) -> int:
    """Removes a closed project's objects and then its rows. Returns the number of objects. Raises ProjectBusy.

    Objects first, as a repetition finds them by the rows. What was added meanwhile is removed under a lock on the
    project's row, which every new row of the project needs.
    """
    with transaction() as session:
        if busy := live_attempts(session, project_id):
            raise ProjectBusy(attempts=busy)
        places = _places(session, project_id)
        jobs = session.scalars(select(Job.id).where(Job.project_id == project_id)).all()
    removed = _remove(storage, places)
    with transaction() as session:
        gone = update(File).where(File.project_id == project_id, File.purged_at.is_(None))
        session.execute(gone.values(purged_at=func.clock_timestamp()))
    for job_id in jobs:
        history.remove_events(transaction, job_id, ROWS)
        history.remove_metrics(transaction, job_id, ROWS)
    with transaction() as session:
        session.get_one(Project, project_id, with_for_update=True)
        session.scalars(select(Job.id).where(Job.project_id == project_id).with_for_update()).all()
        if busy := live_attempts(session, project_id):
            raise ProjectBusy(attempts=busy)
        removed += _remove(storage, _places(session, project_id) - places)
        for table, condition in _owned(project_id).items():
            session.execute(delete(table).where(condition).execution_options(synchronize_session=False))
    return removed


def _owned(project_id: str) -> dict[type[Base], ColumnElement[bool]]:
    """Returns the condition for the project's rows by table; each table precedes those that its rows refer to."""
    jobs = _ids(Job, project_id)
    endpoints = _ids(WebhookEndpoint, project_id)
    deliveries = select(Delivery.id).where(Delivery.endpoint_id.in_(endpoints))
    return {
        DeliveryTry: DeliveryTry.delivery_id.in_(deliveries),
        Delivery: Delivery.endpoint_id.in_(endpoints),
        WebhookEndpoint: WebhookEndpoint.project_id == project_id,
        JobEvent: JobEvent.job_id.in_(jobs),
        Metric: Metric.job_id.in_(jobs),
        Checkpoint: Checkpoint.job_id.in_(jobs),
        Attempt: Attempt.job_id.in_(jobs),
        Job: Job.project_id == project_id,
        Baseline: Baseline.project_id == project_id,
        CapturedFile: CapturedFile.file_id.in_(_ids(File, project_id)),
        Capture: Capture.project_id == project_id,
        Artifact: Artifact.model_id.in_(_ids(Model, project_id)),
        Model: Model.project_id == project_id,
        UploadPart: UploadPart.upload_id.in_(_ids(Upload, project_id)),
        Upload: Upload.project_id == project_id,
        FileEvent: FileEvent.file_id.in_(_ids(File, project_id)),
        FileCleaning: FileCleaning.file_id.in_(_ids(File, project_id)),
        FileReport: FileReport.project_id == project_id,
        File: File.project_id == project_id,
        CapturedRequest: CapturedRequest.project_id == project_id,
        RequestRate: RequestRate.project_id == project_id,
        ModelUsage: ModelUsage.project_id == project_id,
        Key: Key.project_id == project_id,
        Project: Project.id == project_id,
    }


def _ids(
    table: type[Baseline | File | FileReport | Job | Model | Upload | WebhookEndpoint], project_id: str
) -> Select[str]:
    return select(table.id).where(table.project_id == project_id)


def _places(session: Session, project_id: str) -> frozenset[str]:
    """Returns the project's storage keys and prefixes; prefixes end in `/`."""
    keys = session.scalars(select(File.key).where(File.project_id == project_id)).all()
    prefixes = session.scalars(select(Model.prefix).where(Model.project_id == project_id)).all()
    jobs = session.scalars(_ids(Job, project_id)).all()
    uploads = session.scalars(_ids(Upload, project_id)).all()
    reports = session.scalars(_ids(FileReport, project_id)).all()
    folders = [*prefixes, *(f"jobs/{job}" for job in jobs), *(f"uploads/{upload}" for upload in uploads)]
    folders += [f"reports/{report}" for report in reports]
    folders += [f"baselines/{baseline}" for baseline in session.scalars(_ids(Baseline, project_id))]
    return frozenset([*keys, *(f"{folder}/" for folder in folders)])


def _remove(storage: Storage, places: frozenset[str]) -> int:
    removed = 0
    for place in sorted(places):
        found = list(storage.list(place)) if place.endswith("/") else [place] * (storage.stat(place) is not None)
        for key in found:
            storage.delete(key)
        removed += len(found)
    return removed
