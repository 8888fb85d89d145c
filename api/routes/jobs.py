"""Fine-tuning jobs: the routes that OpenAI's API has."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Header, Query, Request
from sqlalchemy.orm import Session, object_session

from api.dependencies import After, CallerDep, SessionDep, SettingsDep, StorageDep, UpTo1000
from api.json_route import JsonRoute
from api.schemas import dry_runs, runs
from api.schemas import jobs as schemas
from api.schemas.base import CursorList, ListOf, errors
from tunery.artifacts import rates
from tunery.jobs import creation, dry_run, gate, ledger, queries, quoting, rerun, waiting
from tunery.jobs.model import Job
from tunery.planning.servable import Limits
from tunery.settings import Settings
from tunery.storage import Storage

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning jobs"], route_class=JsonRoute)

IdempotencyKey = Annotated[str | None, Header(max_length=255, description="Requests with the same key create one job")]
RetryCount = Annotated[int, Header(include_in_schema=False)]


def _shown(session: Session, settings: Settings, job: Job) -> schemas.Job:
    return _shown_all(session, settings, [job])[0]


def _shown_all(session: Session, settings: Settings, jobs: Sequence[Job]) -> list[schemas.Job]:
    warnings = queries.warnings(session, (job.id for job in jobs))
    waits_for = waiting.reasons(session, jobs)
    return [
        schemas.of(
            job,
            organization=settings.organization,
            warnings=warnings.get(job.id, []),
            waits_for=waits_for.get(job.id),
        )
        for job in jobs
    ]


def _created(session: Session, settings: Settings, storage: Storage, job: Job) -> dry_runs.DryRunJob | schemas.Job:
    """Returns the API's object of a new job or a dry run, whose job is in no session."""
    if object_session(job) is None:
        found = dry_run.judge(session, job, settings, partial(rates.of_file, storage))
        return dry_runs.of(found, organization=settings.organization)
    quoting.keep_first(session, job, settings)
    session.refresh(job)
    return _shown(session, settings, job)


@router.post("", summary="Create a fine-tuning job", responses=errors(404, 429))
def create_job(
    body: Annotated[schemas.CreateJob, Body(openapi_examples=schemas.CREATE_EXAMPLES)],
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    storage: StorageDep,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> dry_runs.DryRunJob | schemas.Job:
    """Checks the request, stores the job and returns it at once; a worker then reads the files.

    Safe to repeat with an `Idempotency-Key`. The official client's own retries are recognised without one. With
    `dry_run` nothing is stored, and the response describes the job that would be created."""
    # Proxies and shells send an empty header if a variable is unset: that must not count as one key for all requests.
    key = idempotency_key or None
    job = creation.create(
        session,
        caller,
        body,
        idempotency_key=key,
        is_retry=x_stainless_retry_count > 0,
        limits=Limits.of(settings),
    )
    return _created(session, settings, storage, job)


@router.get("", summary="List fine-tuning jobs", responses=errors(404))
def list_jobs(
    request: Request,
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    after: After = None,
    limit: UpTo1000 = 20,
    metadata: Annotated[Literal["null"] | None, Query(description="Only jobs without metadata")] = None,
) -> ListOf[schemas.Job]:
    """Newest first. `metadata[key]=value` selects jobs with that pair, `metadata=null` those without metadata."""
    given = request.query_params.multi_items()
    rows, more = queries.list_jobs(
        session,
        caller.project_id,
        metadata=[(name[9:-1], value) for name, value in given if name.startswith("metadata[") and name.endswith("]")],
        without_metadata=metadata == "null",
        after=after,
        limit=limit,
    )
    return ListOf(data=_shown_all(session, settings, rows), has_more=more)


@router.get("/{job_id}", summary="Retrieve a fine-tuning job", responses=errors(404))
def retrieve_job(job_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep) -> schemas.Job:
    return _shown(session, settings, ledger.find(session, caller.project_id, job_id))


@router.post("/{job_id}/cancel", summary="Cancel a fine-tuning job", responses=errors(404))
def cancel_job(job_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep) -> schemas.Job:
    """Takes effect at once. A finished job cannot be cancelled (400)."""
    return _shown(session, settings, ledger.cancel(session, caller.project_id, job_id))


@router.post("/{job_id}/pause", summary="Pause a fine-tuning job", responses=errors(404))
def pause_job(job_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep) -> schemas.Job:
    """A queued job is held back; a running one saves its state and frees its device."""
    return _shown(session, settings, ledger.pause(session, caller.project_id, job_id))


@router.post("/{job_id}/resume", summary="Resume a paused fine-tuning job", responses=errors(404))
def resume_job(job_id: str, session: SessionDep, caller: CallerDep, settings: SettingsDep) -> schemas.Job:
    """Returns the job to its old place in the queue; the run continues from its saved state."""
    return _shown(session, settings, ledger.resume(session, caller.project_id, job_id))


@router.post("/{job_id}/rerun", summary="Run a fine-tuning job again", responses=errors(404, 429))
def rerun_job(
    job_id: str,
    session: SessionDep,
    caller: CallerDep,
    settings: SettingsDep,
    storage: StorageDep,
    body: schemas.RerunJob | None = None,
    idempotency_key: IdempotencyKey = None,
    x_stainless_retry_count: RetryCount = 0,
) -> dry_runs.DryRunJob | schemas.Job:
    """Creates a job with the files, the seed and the decided settings of this one, except for the changes in the body.

    Without a body it is the same run, and `GET .../{new job}/reproduction` compares both once it has ended.
    """
    changes = {} if body is None else body.changes
    is_retry = x_stainless_retry_count > 0
    job = rerun.rerun(
        session,
        caller,
        job_id,
        changes,
        idempotency_key=idempotency_key or None,
        is_retry=is_retry,
        limits=Limits.of(settings),
    )
    return _created(session, settings, storage, job)


@router.post("/{job_id}/publish", summary="Publish a withheld model", responses=errors(404))
def publish_model(
    job_id: str, body: schemas.PublishModel, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Job:
    """Overrides the verdict of the gate or of the check of the served model. The verdict is kept; the reason and the
    key are stored in the job's `gate` or `served` and in an event."""
    return _shown(session, settings, gate.publish(session, caller, job_id, reason=body.reason))


@router.get("/{job_id}/events", summary="List a job's events", responses=errors(404))
def list_events(
    job_id: str, session: SessionDep, caller: CallerDep, after: After = None, limit: UpTo1000 = 20
) -> ListOf[runs.Event]:
    """Newest first."""
    job = ledger.find(session, caller.project_id, job_id)
    rows, more = queries.list_events(session, job, after=after, limit=limit)
    return ListOf(data=[runs.Event.of(row) for row in rows], has_more=more)


@router.get("/{job_id}/checkpoints", summary="List a job's checkpoints", responses=errors(404))
def list_checkpoints(
    job_id: str, session: SessionDep, caller: CallerDep, after: After = None, limit: UpTo1000 = 10
) -> CursorList[runs.Checkpoint]:
    """Newest first: usable models of the ends of the last epochs."""
    job = ledger.find(session, caller.project_id, job_id)
    rows, more = queries.list_checkpoints(session, job, after=after, limit=limit)
    data = [runs.Checkpoint.of(row) for row in rows]
    return CursorList.of(data, has_more=more)
