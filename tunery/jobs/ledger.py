"""The operations of a job's owner, and `move`, the only function that changes a job's state, guarded in SQL.

Callers own the transaction and commit at their edge. A worker's operations are in `leases`.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.errors import InvalidValue, NotFound, TuneryError, WrongState
from tunery.jobs.errors import IllegalMove, LeaseLost, QuotaExceeded
from tunery.jobs.model import Job, JobEvent
from tunery.jobs.states import FINAL, LIVE, TRANSITIONS, State
from tunery.keys.model import Project
from tunery.spec import Plan

RETRY_WINDOW = timedelta(minutes=30)
"""How long an automatic retry of a create request returns the job that the first one created."""


# --- writing down -------------------------------------------------------------------------------------------------


def note(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
    outcome: str | None = None,
) -> None:
    """Adds an event to the job."""
    session.add(
        JobEvent(
            id=ids.new(ids.EVENT), job_id=job_id, level=level, type=type, message=message, data=data, outcome=outcome
        )
    )
    session.flush()


def move(session: Session, job: Job, target: State, *, message: str, level: str = "info", **values: Any) -> None:
    """Moves a job along an edge of TRANSITIONS, if its row still has the state that was read, and adds an event.

    Raises IllegalMove for an edge that does not exist and LeaseLost when the row has changed.
    """
    source = State(job.state)
    if target not in TRANSITIONS[source]:
        raise IllegalMove(source=source, target=target)
    if target in FINAL:
        values |= {"finished_at": func.clock_timestamp()}
    if target is State.QUEUED:
        values.setdefault("queued_at", func.clock_timestamp())
    if target is not State.RUNNING:
        values |= {"pause_requested": None, "phase": None, "estimated_finish": None}
    moved = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.state == source, Job.fence == job.fence)
        .values(state=target, **values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if moved is None:
        raise LeaseLost(job=job.id, attempt=job.fence)
    session.refresh(job)
    note(session, job.id, message, level=level, outcome=target.value if target in FINAL else None)
    if target is State.QUEUED:
        dispatch.nudge_after_commit(session, dispatch.TRAIN)
    if target in FINAL:
        dispatch.nudge_after_commit(session, dispatch.IO)


# --- finding ------------------------------------------------------------------------------------------------------


def find(session: Session, project_id: str, job_id: str, *, lock: bool = False) -> Job:
    """Returns the project's job. Raises NotFound, also for a job of another project."""
    query = select(Job).where(Job.id == job_id, Job.project_id == project_id)
    job = session.scalar(query.with_for_update() if lock else query)
    if job is None:
        raise NotFound(kind="fine-tuning job", id=job_id)
    return job


def live_job_using(session: Session, file_id: str) -> str | None:
    """Returns the id of an unfinished job that uses the file, or None."""
    return session.scalar(
        select(Job.id)
        .where(Job.state.in_(LIVE))
        .where(
            (Job.training_file == file_id)
            | (Job.validation_file == file_id)
            | (Job.test_file == file_id)
            | (Job.spec["replay"]["source"].astext == file_id)
        )
        .limit(1)
    )


# --- the owner's operations ---------------------------------------------------------------------------------------


def submit(session: Session, job: Job, *, messages: Sequence[tuple[str, str]] = ()) -> Job:
    """Stores a new job in `validating_files`. `messages` are further events, as (level, text).

    Raises QuotaExceeded when the project has reached its limit of waiting jobs.
    """
    project = session.get_one(Project, job.project_id)
    if project.max_queued is not None:
        waiting = session.scalar(
            select(func.count()).where(Job.project_id == project.id, Job.state.in_(LIVE - {State.RUNNING}))
        )
        if (waiting or 0) >= project.max_queued:
            raise QuotaExceeded(
                what=f"This project has {waiting} waiting jobs and may have at most {project.max_queued}."
            )
    job.id = job.id or ids.new(ids.JOB)
    session.add(job)
    session.flush()
    note(session, job.id, f"Created fine-tuning job: {job.id}")
    for level, message in messages:
        note(session, job.id, message, level=level)
    dispatch.nudge_after_commit(session, dispatch.IO)
    return job


def earlier_request(
    session: Session, project_id: str, *, idempotency_key: str | None, request_sha256: str, is_retry: bool
) -> Job | None:
    """Returns the job that this request has created already, if any; concurrent copies of a request are serialised.

    With an Idempotency-Key: the job of that key, for as long as it is stored; raises InvalidValue if the key came with
    a different request. Without one, for a client's automatic retry: the job of an identical request within
    RETRY_WINDOW.
    """
    twin_lock = func.hashtextextended(f"{project_id} {idempotency_key or request_sha256}", 0)
    session.execute(select(func.pg_advisory_xact_lock(twin_lock)))
    if idempotency_key is not None:
        job = session.scalar(select(Job).where(Job.project_id == project_id, Job.idempotency_key == idempotency_key))
        if job is not None and job.request_sha256 != request_sha256:
            raise InvalidValue(
                param="Idempotency-Key",
                reason=f"This Idempotency-Key was already used for a different request (job '{job.id}'). Use a new "
                "key.",
            )
        return job
    if not is_retry:
        return None
    return session.scalar(
        select(Job)
        .where(Job.project_id == project_id, Job.request_sha256 == request_sha256)
        .where(Job.created_at > func.clock_timestamp() - RETRY_WINDOW)
        .order_by(Job.created_at.desc())
        .limit(1)
    )


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancels a job at once, from every live state; its worker learns of it when it next renews the lease.

    The fence is raised, so later reports of the worker are not written. Raises NotFound, WrongState.
    """
    job = find(session, project_id, job_id, lock=True)
    if job.state in FINAL:
        raise WrongState(
            kind="Fine-tuning job",
            id=job_id,
            state=job.state,
            action="cancelled",
            instead="Only unfinished jobs can be.",
        )
    move(session, job, State.CANCELLED, message="The job was cancelled", fence=job.fence + 1)
    return job


def pause(session: Session, project_id: str, job_id: str) -> Job:
    """Pauses a queued job; asks a running one to save and stop. Pausing a paused job changes nothing.

    Raises NotFound, WrongState.
    """
    job = find(session, project_id, job_id, lock=True)
    if job.state == State.QUEUED:
        move(session, job, State.PAUSED, message="The job was paused")
    elif job.state == State.RUNNING:
        if job.pause_requested != "pause":
            job.pause_requested = "pause"
            session.flush()
            note(session, job.id, "Pausing: the job is saving its state")
    elif job.state != State.PAUSED:
        raise WrongState(
            kind="Fine-tuning job",
            id=job_id,
            state=job.state,
            action="paused",
            instead="Only queued and running jobs can be.",
        )
    return job


def resume(session: Session, project_id: str, job_id: str) -> Job:
    """Returns a paused job to its old place in the queue. Raises NotFound, WrongState."""
    job = find(session, project_id, job_id, lock=True)
    if job.state == State.PAUSED:
        move(session, job, State.QUEUED, message="The job was resumed and is queued", queued_at=job.queued_at)
    elif job.state == State.RUNNING and job.pause_requested == "pause":
        job.pause_requested = None
        session.flush()
        note(session, job.id, "The request to pause was withdrawn")
    else:
        raise WrongState(
            kind="Fine-tuning job", id=job_id, state=job.state, action="resumed", instead="Only paused jobs can be."
        )
    return job


# --- validation ---------------------------------------------------------------------------------------------------


def next_to_validate(session: Session, *, skip: Sequence[str] = ()) -> Job | None:
    """Returns the oldest job whose files are ready, locked for this transaction; other workers skip it."""
    return session.scalar(
        select(Job)
        .where(Job.state == State.VALIDATING, Job.id.not_in(skip))
        .where(
            text(
                "NOT EXISTS (SELECT 1 FROM files f WHERE f.status = 'uploaded'"
                " AND f.id IN (jobs.training_file, jobs.validation_file, jobs.test_file,"
                " jobs.spec #>> '{replay,source}'))"
            )
        )
        .order_by(Job.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def enqueue(
    session: Session,
    job: Job,
    plan: Plan,
    *,
    gpu_bytes: int = 0,
    cpu_bytes: int | None = 0,
    warnings: Sequence[str] = (),
) -> None:
    """Queues a job whose files are valid and whose plan is made, so that workers may claim it.

    The claim needs `gpu_bytes` on each of its GPUs, or `cpu_bytes` on a host without one (None: only GPUs).
    """
    for warning in warnings:
        note(session, job.id, warning, level="warn")
    move(
        session,
        job,
        State.QUEUED,
        message="Files validated, moving job to queued state",
        plan=plan.model_dump(mode="json"),
        gpus=plan.resources.gpus,
        gpu_bytes=gpu_bytes,
        cpu_bytes=cpu_bytes,
    )


def fail_job(session: Session, job: Job, error: TuneryError) -> None:
    """Fails a job whose row the caller has locked. The error's text is shown to the job's owner."""
    move(
        session,
        job,
        State.FAILED,
        message=error.message,
        level="error",
        error_code=error.code,
        error_message=error.message,
        error_param=error.param,
    )
