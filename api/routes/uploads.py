"""Uploads: large files, part by part. The bytes of parts stream through like those of files."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from sqlalchemy.orm import Session, sessionmaker

from api import multipart
from api.dependencies import CallerDep, SessionDep, SessionsDep, SettingsDep, StorageDep, StreamCallerDep
from api.json_route import JsonRoute
from api.schemas import files as schemas
from api.schemas.base import Body, errors
from tunery.datasets import uploads
from tunery.datasets.model import Upload
from tunery.storage import Storage, Stored

router = APIRouter(prefix="/v1/uploads", tags=["Uploads"], route_class=JsonRoute)

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary", "description": "The part's bytes"}},
                    "example": {},
                }
            }
        },
    }
}


class _NoFields(Body):
    """A part has no text fields."""


@router.post("", summary="Begin an Upload", responses=errors(413))
def create_upload(
    body: schemas.CreateUpload, session: SessionDep, caller: CallerDep, settings: SettingsDep
) -> schemas.Upload:
    """It accepts parts for an hour."""
    row = uploads.create(
        session,
        caller.project_id,
        bytes=body.bytes,
        filename=body.filename,
        mime_type=body.mime_type,
        purpose=body.purpose,
        limit=settings.max_upload_bytes,
        file_expires_after=body.expires_after.seconds if body.expires_after else None,
    )
    return schemas.Upload.of(row)


@router.post("/{upload_id}/parts", summary="Add a part to an Upload", responses=errors(404, 413), openapi_extra=_FORM)
async def create_part(
    upload_id: str,
    request: Request,
    caller: StreamCallerDep,
    sessions: SessionsDep,
    storage: StorageDep,
    settings: SettingsDep,
) -> schemas.UploadPart:
    """At most 64 MiB. Parts may be sent in parallel; `complete` gives their order."""
    await run_in_threadpool(_check_open, sessions, caller.project_id, upload_id)
    async with contextmanager_in_threadpool(storage.writer(uploads.new_part_key(upload_id))) as writer:
        form = await multipart.receive(
            request,
            file_field="data",
            limit=settings.max_part_bytes,
            what="The part",
            instead="Send smaller parts.",
            take=lambda _, data: writer.write(data),
        )
        multipart.parse_fields(form, _NoFields)
    limit = settings.max_upload_bytes
    return await run_in_threadpool(_add, sessions, storage, caller.project_id, upload_id, writer.stored, limit)


def _check_open(sessions: sessionmaker[Session], project_id: str, upload_id: str) -> None:
    """Checks the Upload before the first byte, so that a client does not send 64 MiB to a finished one."""
    with sessions.begin() as session:
        uploads.check_pending(session, uploads.find(session, project_id, upload_id), "given more parts")


def _add(
    sessions: sessionmaker[Session], storage: Storage, project_id: str, upload_id: str, stored: Stored, limit: int
) -> schemas.UploadPart:
    try:
        with sessions.begin() as session:
            # Locked, so that concurrent parts see each other's bytes in the total.
            upload = uploads.find(session, project_id, upload_id, lock=True)
            part = uploads.add_part(session, upload, stored, limit=limit)
    except Exception:
        storage.delete(stored.key)
        raise
    return schemas.UploadPart.of(part)


@router.post("/{upload_id}/complete", summary="Complete an Upload", responses=errors(404))
def complete_upload(
    upload_id: str, body: schemas.CompleteUpload, caller: StreamCallerDep, sessions: SessionsDep, storage: StorageDep
) -> schemas.Upload:
    """Joins the parts into a file. A worker then checks a training file; until then its status is `uploaded`.

    Safe to repeat: a completed Upload returns its file.
    """
    with sessions.begin() as session:
        upload = uploads.find(session, caller.project_id, upload_id)
        if (file := uploads.completed(session, upload)) is not None:
            return schemas.Upload.of(upload, file)
        parts = uploads.choose(session, upload, body.part_ids)
    return _complete(sessions, storage, upload, uploads.join(storage, parts, body.md5))


def _complete(sessions: sessionmaker[Session], storage: Storage, upload: Upload, stored: Stored) -> schemas.Upload:
    """Completes the Upload in a transaction that begins once the bytes are joined; removes unused bytes."""
    kept = None
    try:
        with sessions.begin() as session:
            row = uploads.find(session, upload.project_id, upload.id, lock=True)
            file = uploads.complete(session, row, stored)
        kept = file.key
        return schemas.Upload.of(row, file)
    finally:
        if kept != stored.key:
            storage.delete(stored.key)


@router.post("/{upload_id}/cancel", summary="Cancel an Upload", responses=errors(404))
def cancel_upload(upload_id: str, session: SessionDep, caller: CallerDep) -> schemas.Upload:
    """Its parts are deleted."""
    row = uploads.find(session, caller.project_id, upload_id, lock=True)
    return schemas.Upload.of(uploads.cancel(session, row))
