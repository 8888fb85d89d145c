"""Files. An upload is checked and stored as it arrives, without an open transaction."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from sqlalchemy.orm import Session, sessionmaker

from api import downloads, multipart
from api.dependencies import After, CallerDep, SessionDep, SessionsDep, SettingsDep, StorageDep, StreamCallerDep
from api.multipart import Form
from api.schemas import files as schemas
from api.schemas.base import CursorList, errors
from tunery.baselines.ledger import live_user_of
from tunery.datasets import arrival, files, reports
from tunery.datasets.arrival import ArrivalCheck
from tunery.datasets.model import File
from tunery.keys.auth import Caller
from tunery.paging import Order
from tunery.rows.errors import InvalidRows
from tunery.storage import Storage, Stored, Writer

router = APIRouter(prefix="/v1/files", tags=["Files"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": list(schemas.Purpose.__args__), "default": "fine-tune"},  # type: ignore[attr-defined]
                        "file": {"type": "string", "format": "binary", "description": "Rows for fine-tuning"},
                        # Plain strings, empty: forms made from this document fill in any default or least value.
                        "expires_after[anchor]": {
                            "type": "string",
                            "example": "",
                            "description": "`created_at`, together with `seconds`",
                        },
                        "expires_after[seconds]": {
                            "type": "string",
                            "example": "",
                            "description": "The file is deleted after this many seconds (3600 to 2592000)",
                        },
                    },
                    "example": {"purpose": "fine-tune"},
                }
            }
        },
    }
}


class _Arriving:
    """A file being uploaded: every piece is checked, then stored.

    Clients differ in where they send `purpose`: if before the file, the first bad line ends the upload at once; if
    after it, the error is held until it is known whether lines matter.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._checker = ArrivalCheck()
        self._fault: InvalidRows | None = None

    def take(self, form: Form, data: bytes) -> None:
        if self._fault is None and form.fields.get("purpose", files.FINE_TUNE) == files.FINE_TUNE:
            self._check(self._checker.feed, data)
        if self._fault is not None and form.fields.get("purpose") == files.FINE_TUNE:
            raise self._fault
        self._writer.write(data)

    def close(self, purpose: str) -> None:
        if purpose == files.FINE_TUNE:
            if self._fault is None:
                self._check(self._checker.close)
            if self._fault is not None:
                raise self._fault

    def _check(self, step: Any, *data: bytes) -> None:
        try:
            step(*data)
        except InvalidRows as fault:
            self._fault = fault


@router.post("", summary="Upload a file", responses=errors(413), openapi_extra=_FORM)
async def create_file(
    request: Request, caller: StreamCallerDep, sessions: SessionsDep, storage: StorageDep, settings: SettingsDep
) -> schemas.File:
    """Training data may have any supported format. An invalid file is refused at once and not stored."""
    async with contextmanager_in_threadpool(storage.writer(files.new_key())) as writer:
        arriving = _Arriving(writer)
        form = await multipart.receive(
            request,
            file_field="file",
            limit=settings.max_file_bytes,
            what="The file",
            instead="Send larger files as an Upload, part by part (`POST /v1/uploads`).",
            take=arriving.take,
        )
        fields = multipart.parse_fields(form, schemas.FileFields)
        arriving.close(fields.purpose)
    return await run_in_threadpool(_record, sessions, storage, caller, form, fields, writer.stored)


def _record(
    sessions: sessionmaker[Session],
    storage: Storage,
    caller: Caller,
    form: Form,
    fields: schemas.FileFields,
    stored: Stored,
) -> schemas.File:
    """Creates the row in a transaction that begins once all bytes are stored; removes the bytes if that fails."""
    try:
        with sessions.begin() as session:
            row = files.create(
                session,
                caller.project_id,
                stored,
                purpose=fields.purpose,
                filename=(form.filename or "upload")[:255],
                expires_after=fields.expires_after.seconds if fields.expires_after else None,
            )
            return _shown(session, [row])[0]
    except Exception:
        storage.delete(stored.key)
        raise


def _shown(session: Session, rows: Sequence[File]) -> list[schemas.File]:
    """Returns the files with their reports."""
    found = reports.of_files(session, rows)
    return [schemas.File.of(row, found.get(row.id)) for row in rows]


@router.get("", summary="List files", responses=errors(404))
def list_files(
    session: SessionDep,
    caller: CallerDep,
    purpose: Annotated[str | None, Query(description="Only files of this purpose")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Objects per page")] = 10_000,
    order: Annotated[Order, Query(description="By creation time")] = "desc",
    after: After = None,
) -> CursorList[schemas.File]:
    rows, more = files.list_page(session, caller.project_id, purpose=purpose, after=after, limit=limit, order=order)
    return CursorList.of(_shown(session, rows), has_more=more)


@router.get("/{file_id}", summary="Retrieve a file", responses=errors(404))
def retrieve_file(file_id: str, session: SessionDep, caller: CallerDep) -> schemas.File:
    return _shown(session, [files.find(session, caller.project_id, file_id)])[0]


@router.delete("/{file_id}", summary="Delete a file", responses=errors(404))
def delete_file(file_id: str, session: SessionDep, caller: CallerDep) -> schemas.FileDeleted:
    """Refused (400) while an unfinished job needs the file."""
    row = files.find(session, caller.project_id, file_id)
    session.refresh(row, with_for_update=True)  # against a job that is being created on it concurrently
    files.delete(session, row, in_use_by=live_user_of(session, file_id))
    return schemas.FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses=errors(404)
    | {
        200: {"content": {"application/octet-stream": {"example": '{"messages": []}\n'}}, "description": "Its bytes"},
        302: {"description": "Redirect to the object storage; the address is valid for 15 minutes"},
    },
)
def download_file(
    file_id: str,
    session: SessionDep,
    caller: CallerDep,
    storage: StorageDep,
    settings: SettingsDep,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """A result file (fine-tune-results) is base64-encoded for `Accept: application/binary`, as in OpenAI's API."""
    row = files.find(session, caller.project_id, file_id)
    arrival.check_written(row)
    if row.purpose == files.RESULTS:
        coded = accept == "application/binary" if settings.result_files == "auto" else settings.result_files == "base64"
        return downloads.result_file(storage, row.key, coded=coded)
    return downloads.answer(storage, row.key, filename=row.filename, bytes=row.bytes, sha256=row.sha256)
