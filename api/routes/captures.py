"""Captured requests of a project, feedback on their answers, and files made of both."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.dependencies import After, CallerDep, SessionDep, SessionsDep, StorageDep, StreamCallerDep, UpTo100
from api.json_route import JsonRoute
from api.schemas import captures as schemas
from api.schemas.base import ListOf, errors
from api.schemas.files import File
from tunery.datasets import files
from tunery.models import registry
from tunery.storage import Storage, Stored
from tunery.traffic import captures
from tunery.traffic.captures import FileOrder

router = APIRouter(prefix="/v1", tags=["Captured requests"], route_class=JsonRoute)


@router.post("/models/{model}/capture", summary="Capture a model's requests", responses=errors(404))
def start_capture(model: str, body: schemas.SetCapture, session: SessionDep, caller: CallerDep) -> schemas.ModelCapture:
    """From now on, stores each chat or response request with its first answer, with personal data and secrets redacted.
    For a base, only this project's requests."""
    row = registry.find_ready(session, caller.project_id, model)
    capture = captures.start(session, caller.project_id, row, keep_days=body.keep_days)
    kept = captures.counts(session, caller.project_id, row)
    return schemas.ModelCapture(model=row.id, enabled=True, keep_days=capture.keep_days, **kept)


@router.get("/models/{model}/capture", summary="Count a model's captured requests", responses=errors(404))
def retrieve_capture(model: str, session: SessionDep, caller: CallerDep) -> schemas.ModelCapture:
    row = registry.find(session, caller.project_id, model)
    capture = captures.setting(session, caller.project_id, row.id)
    kept = captures.counts(session, caller.project_id, row)
    days = None if capture is None else capture.keep_days
    return schemas.ModelCapture(model=row.id, enabled=capture is not None, keep_days=days, **kept)


@router.delete("/models/{model}/capture", summary="Stop capturing a model's requests", responses=errors(404))
def stop_capture(model: str, session: SessionDep, caller: CallerDep) -> schemas.CaptureStopped:
    """Nothing more is captured, and captured requests are deleted with their feedback. Files made from them are
    kept."""
    row = registry.find(session, caller.project_id, model)
    return schemas.CaptureStopped(model=row.id, removed=captures.stop(session, caller.project_id, row))


@router.get("/models/{model}/capture/requests", summary="List a model's captured requests", responses=errors(404))
def list_captured_requests(
    model: str,
    session: SessionDep,
    caller: CallerDep,
    rated: Annotated[captures.Rated | None, Query(description="Only rated, corrected or unrated requests")] = None,
    after: After = None,
    limit: UpTo100 = 20,
) -> ListOf[schemas.CapturedChat]:
    """Newest first, each with its answer and feedback, as stored: with personal data redacted."""
    row = registry.find(session, caller.project_id, model)
    found, more = captures.list_page(session, caller.project_id, row, rated=rated, after=after, limit=limit)
    return ListOf(data=[schemas.CapturedChat.of(one) for one in found], has_more=more)


@router.post("/feedback", summary="Rate or correct an answer", responses=errors(404))
def give_feedback(body: schemas.GiveFeedback, session: SessionDep, caller: CallerDep) -> schemas.Feedback:
    """Only for captured requests. A rating or correction replaces an earlier one."""
    from tunery.datasets.cleaning.redaction import redact  # here: it takes most of a second to import

    correction = None if body.message is None else redact(body.message)
    row = captures.rate(session, caller.project_id, body.id, rating=body.score, correction=correction)
    return schemas.Feedback.of(row)


@router.post("/models/{model}/capture/files", summary="Create a file from captured requests", responses=errors(404))
def make_file(
    model: str, body: schemas.MakeFile, caller: StreamCallerDep, sessions: SessionsDep, storage: StorageDep
) -> File:
    """Creates a training or test file: each request with its answer, or with its correction if it has one."""
    order = FileOrder(format=body.format, answers=body.answers)
    with sessions.begin() as session:
        row = registry.find(session, caller.project_id, model)
        stored, used = _write(storage, captures.lines(session, caller.project_id, row, order))
    try:
        with sessions.begin() as session:
            name = body.filename or f"captured-{order.format}.jsonl"
            made = files.create(session, caller.project_id, stored, purpose=files.FINE_TUNE, filename=name)
            captures.note_file(session, made, row, order, used)
            return File.of(made)
    except Exception:
        storage.delete(stored.key)
        raise


def _write(storage: Storage, lines: captures.Lines) -> tuple[Stored, list[str]]:
    used = []
    with storage.writer(files.new_key()) as writer:
        for id, line in lines:
            writer.write(line)
            used.append(id)
    return writer.stored, used


@router.get("/files/{file_id}/capture", summary="Retrieve a captured file's lineage", responses=errors(404))
def retrieve_file_capture(file_id: str, session: SessionDep, caller: CallerDep) -> schemas.FileCapture:
    """The model and requests from which the file was made. 404 for other files."""
    file = files.find(session, caller.project_id, file_id)
    return schemas.FileCapture.of(captures.find_file(session, file))
