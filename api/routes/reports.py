"""Reports of files, as JSON and as a page. The first request for another base, comparison or columns queues one."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, Response

from api.dependencies import CallerDep, ColumnsDep, SessionDep, StorageDep
from api.schemas import reports as schemas
from api.schemas.base import errors
from tunery.datasets import files, reports
from tunery.datasets.model import File, FileReport
from tunery.datasets.report import page
from tunery.models import registry
from tunery.storage import Storage

router = APIRouter(prefix="/v1/files/{file_id}", tags=["Files"])


@dataclass(frozen=True)
class Asked:
    """The report that a request is about, by its file, base and comparison."""

    file: File
    row: FileReport
    base: str | None
    against: str | None


def find_report(
    file_id: str,
    session: SessionDep,
    caller: CallerDep,
    columns: ColumnsDep,
    base: Annotated[str | None, Query(description="A model whose tokenizer counts the tokens")] = None,
    against: Annotated[str | None, Query(description="A file that should have no rows in common")] = None,
) -> Asked:
    """Finds the report, or has it made."""
    file = files.find(session, caller.project_id, file_id)
    reports.check_reported(file)
    model = None if base is None else registry.find_ready(session, caller.project_id, base)
    other = None if against is None else files.find(session, caller.project_id, against, param="against")
    if other is not None:
        reports.check_reported(other)
    counted = "" if model is None else (model.base_id or model.id)
    sha256 = "" if other is None else other.sha256
    row = reports.request(session, file, base=counted, against=sha256, columns=columns)
    return Asked(file, row, base, against)


AskedDep = Annotated[Asked, Depends(find_report)]


@router.get("/report", summary="Retrieve a file's report", response_model=schemas.FileReport, responses=errors(404))
def retrieve_report(asked: AskedDep, storage: StorageDep) -> Response:
    """Problems of the file's rows. While `status` is `queued` or `running`, repeat the request.

    With `base` it includes the rows' tokens, with `against` rows that are also in another file; with `columns` rows are
    read by them. Such a report is made at the first request and stored."""
    row = asked.row
    state = schemas.FileReport.of(row, file=asked.file.id, base=asked.base, against=asked.against)
    if row.status != reports.READY:
        return Response(state.model_dump_json(), media_type="application/json")
    # Joined as text: to check a hundred thousand findings, which a worker has written, would take seconds.
    head = state.model_dump_json(exclude=schemas.SAID).encode()
    return Response(head[:-1] + b", " + _read(storage, row)[1:], media_type="application/json")


@router.get(
    "/report.html",
    summary="Show a file's report",
    response_class=Response,
    responses=errors(404) | {200: {"content": {"text/html": {"example": "<!doctype html>"}}, "description": "A page"}},
)
def show_report(asked: AskedDep, storage: StorageDep) -> HTMLResponse:
    """The report as a self-contained page, which reloads until the report is ready."""
    row = asked.row
    state = {"status": row.status, "progress": row.progress, "error": row.error}
    shown = page.render(asked.file.filename, _load(storage, row), state=state)
    return HTMLResponse(shown, headers=page.HEADERS)


def _load(storage: Storage, row: FileReport) -> dict[str, Any]:
    if row.status != reports.READY:
        return {}
    found: dict[str, Any] = json.loads(_read(storage, row))
    return found


def _read(storage: Storage, row: FileReport) -> bytes:
    return b"".join(storage.read(f"{row.prefix}/report.json"))
