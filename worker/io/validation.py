"""Moves jobs from `validating_files` to the queue or to their end: picks the next one and records the outcome."""

import logging

from sqlalchemy.orm import Session

from tunery import db
from tunery.datasets.model import File
from tunery.db import UNREACHABLE
from tunery.errors import TuneryError, Unavailable
from tunery.failures import InvalidTrainingFile, JobFailure, ValidationBroke, ValidationLost
from tunery.jobs import leases, ledger, quoting
from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.models import imports
from tunery.models.model import Model
from tunery.rows.errors import CannotRender
from tunery.rows.messages import FileRole
from tunery.settings import Settings
from tunery.spec import TrainingSpec
from tunery.storage import Storage
from tunery.storage.errors import ChecksumMismatch, ObjectMissing
from worker.io.checks import Case, Verdict, judge
from worker.io.claims import advisory_lock

log = logging.getLogger(__name__)

MAX_VALIDATIONS = 3
"""How many workers may crash while validating a job before the job fails: every other job waits behind it."""
_INTERRUPTED: set[str] = set()
"""Jobs whose validation in this process was interrupted by an outage."""


def validate_next(settings: Settings, storage: Storage) -> bool:
    """Validates one job; returns whether there was one."""
    skip: list[str] = []
    while True:
        with db.transaction() as session:
            job = ledger.next_to_validate(session, skip=skip)
            if job is None:
                return False
            skip.append(job.id)
        with advisory_lock(f"validate {job.id}") as mine:
            if mine:
                _plan_job(job.id, settings, storage)
                return True


def _open(session: Session, job: Job) -> Case:
    ids: dict[FileRole, str | None] = {
        "training": job.training_file,
        "validation": job.validation_file,
        "test": job.test_file,
        "replay": job.replay_file,
    }
    base = session.get_one(Model, job.base_model)
    parent = session.get_one(Model, job.parent_model) if job.parent_model else None
    return Case(
        job_id=job.id,
        now=job.now,
        spec=TrainingSpec.model_validate(job.spec),
        files={role: session.get_one(File, id) for role, id in ids.items() if id is not None},
        base=base,
        # An adapter that was trained elsewhere may have its own template.
        rendered_by=base if parent is None or imports.technique_of(parent) is None else parent,
        model=job.model_name,
        devices=leases.devices(session),
    )


def _plan_job(job_id: str, settings: Settings, storage: Storage) -> None:
    if not _announce(job_id):
        return
    try:
        _record(job_id, _verdict(job_id, settings, storage), settings)
    except Exception:
        _INTERRUPTED.add(job_id)
        raise


def _record(job_id: str, verdict: Verdict | TuneryError, settings: Settings) -> None:
    with db.transaction() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state != State.VALIDATING:  # cancelled meanwhile
            return
        if isinstance(verdict, TuneryError):
            ledger.fail_job(session, job, verdict)
        else:
            ledger.enqueue(
                session,
                job,
                verdict.plan,
                gpu_bytes=verdict.gpu_bytes,
                cpu_bytes=verdict.cpu_bytes,
                warnings=verdict.warnings,
            )
            quoting.requote(session, job, verdict.counts, settings)


def _announce(job_id: str) -> bool:
    """Records that the job is being validated; False if it has moved on meanwhile or has crashed too many workers."""
    with db.transaction() as session:
        job = session.get_one(Job, job_id, with_for_update=True)
        if job.state != State.VALIDATING:
            return False
        if job_id in _INTERRUPTED:  # by an outage that this process survived
            job.validations -= 1
        if job.validations >= MAX_VALIDATIONS:
            ledger.fail_job(session, job, ValidationLost(times=job.validations))
            return False
        job.validations += 1
        message = f"Validating training file: {job.training_file}"
        if job.validation_file is not None:
            message += f" and validation file: {job.validation_file}"
        ledger.note(session, job.id, message)
    _INTERRUPTED.discard(job_id)
    return True


def _verdict(job_id: str, settings: Settings, storage: Storage) -> Verdict | TuneryError:
    """Returns the verdict, or the error that fails the job. Raises only errors that a retry may overcome."""
    try:
        with db.transaction() as session:
            case = _open(session, session.get_one(Job, job_id))
        return judge(case, settings, storage)
    except JobFailure as error:
        return error
    except (Unavailable, *UNREACHABLE):
        raise
    except (CannotRender, ObjectMissing, ChecksumMismatch) as error:
        return InvalidTrainingFile(param="training_file", role="training", reason=error.message)
    except Exception as error:  # an internal error, which must not keep later jobs from their turn
        log.exception("%s could not be validated", job_id)
        return ValidationBroke(reason=type(error).__name__)
