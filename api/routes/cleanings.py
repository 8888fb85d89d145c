"""Cleanings of files: the new file's row is created at once, and a worker writes its bytes."""

from fastapi import APIRouter

from api.dependencies import CallerDep, SessionDep
from api.json_route import JsonRoute
from api.schemas import cleanings as schemas
from api.schemas.base import errors
from api.schemas.files import File
from tunery.datasets import cleanings, files
from tunery.models import registry

router = APIRouter(prefix="/v1/files/{file_id}", tags=["Files"], route_class=JsonRoute)


@router.post("/clean", summary="Clean a file", responses=errors(404))
def clean_file(file_id: str, body: schemas.CleanFile, session: SessionDep, caller: CallerDep) -> File:
    """Creates a new file from the file's rows, using the findings of its report; the file itself is not changed.

    The new file has the status `uploaded` until a worker has written it, then `processed`.
    """
    source = files.find(session, caller.project_id, file_id)
    against = None
    if body.against is not None:
        against = files.find(session, caller.project_id, body.against, param="against")
    base = None if body.base is None else registry.find_ready(session, caller.project_id, body.base)
    counted = None if base is None else (base.base_id or base.id)
    return File.of(cleanings.request(session, source, body.order, against=against, base=counted))


@router.get("/cleaning", summary="Retrieve a file's lineage", responses=errors(404))
def retrieve_cleaning(file_id: str, session: SessionDep, caller: CallerDep) -> schemas.FileCleaning:
    """The source file, the actions, and the dropped and changed rows. 404 for an uploaded file."""
    return schemas.FileCleaning.of(cleanings.find(session, files.find(session, caller.project_id, file_id)))
