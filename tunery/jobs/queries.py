"""Read-only lists of jobs and their events, checkpoints and metrics."""

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery.jobs.model import Checkpoint, Job, JobEvent, Metric
from tunery.paging import page

_CURSOR = "object to go on after"


def list_jobs(
    session: Session,
    project_id: str,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    without_metadata: bool = False,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Job], bool]:
    """Returns one page of a project's jobs, newest first, and whether more follow. Raises NotFound.

    `metadata`: pairs that a job must all have. `without_metadata`: only jobs that have none.
    """
    shown = [Job.user_metadata[name].astext == value for name, value in metadata]
    if without_metadata:
        shown.append(Job.user_metadata.is_(None))
    owned = select(Job).where(Job.project_id == project_id)
    by = (Job.created_at, Job.id)
    return page(session, owned, *shown, by=by, id=Job.id, kind=_CURSOR, after=after, limit=limit)


def list_events(session: Session, job: Job, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
    """Returns one page of a job's events, newest first, and whether more follow. Raises NotFound."""
    owned = select(JobEvent).where(JobEvent.job_id == job.id)
    return page(session, owned, by=(JobEvent.seq,), id=JobEvent.id, kind=_CURSOR, after=after, limit=limit)


def list_checkpoints(session: Session, job: Job, *, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
    """Returns one page of a job's checkpoints, latest step first, and whether more follow. Raises NotFound."""
    owned = select(Checkpoint).where(Checkpoint.job_id == job.id)
    return page(session, owned, by=(Checkpoint.step,), id=Checkpoint.id, kind=_CURSOR, after=after, limit=limit)


def list_metrics(session: Session, job: Job, *, after_step: int, limit: int) -> tuple[list[Metric], bool]:
    """Returns up to `limit` of a job's measurements later than `after_step`, oldest first, and whether more follow."""
    query = select(Metric).where(Metric.job_id == job.id, Metric.step > after_step).order_by(Metric.step)
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def warnings(session: Session, job_ids: Iterable[str]) -> dict[str, list[str]]:
    """Returns the texts of each job's warnings, oldest first. Jobs without one are left out."""
    found: dict[str, list[str]] = {}
    query = select(JobEvent.job_id, JobEvent.message).where(JobEvent.job_id.in_(job_ids), JobEvent.level == "warn")
    for job_id, message in session.execute(query.order_by(JobEvent.seq)):
        found.setdefault(job_id, []).append(message)
    return found
