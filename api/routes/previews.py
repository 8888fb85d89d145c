"""What a base would learn of a file, token by token."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from api.dependencies import ColumnsDep, SessionsDep, StorageDep, StreamCallerDep
from api.schemas.base import errors
from api.schemas.files import FilePreview
from tunery.artifacts import templates
from tunery.datasets import arrival, files
from tunery.errors import InvalidValue
from tunery.failures import InvalidTrainingFile
from tunery.models import registry
from tunery.models.model import Model
from tunery.rows import preview, preview_page
from tunery.rows.encoding import encoder_of_any
from tunery.rows.preview_model import Preview
from tunery.spec import LossOn

router = APIRouter(prefix="/v1/files", tags=["Files"])


# A def without a transaction: rendering takes a second or two, and no connection of the database waits meanwhile.
@router.get(
    "/{file_id}/preview",
    summary="Preview what a model learns from a file",
    response_model=FilePreview,
    responses=errors(404)
    | {200: {"content": {"text/html": {"example": "<!doctype html>..."}}, "description": "The preview"}},
)
def preview_file(
    file_id: str,
    caller: StreamCallerDep,
    sessions: SessionsDep,
    storage: StorageDep,
    columns: ColumnsDep,
    model: Annotated[
        str, Query(min_length=1, description="A base or tuned model whose tokenizer and template are used")
    ],
    rows: Annotated[int, Query(ge=1, le=preview.MOST_ROWS, description="Number of rows, from the file's start")] = 3,
    max_tokens: Annotated[int, Query(ge=16, le=1_048_576, description="The job's max_seq_length")] = 2048,
    loss_on: Annotated[LossOn, Query(description="Which tokens are trained")] = "assistant",
    format: Annotated[Literal["json", "html"], Query(description="html: a page with coloured tokens")] = "json",
) -> FilePreview | Response:
    """Every token of the first rows as the trainer will see it (trained, masked or cut), and checks of them."""
    with sessions.begin() as session:
        file = files.find(session, caller.project_id, file_id)
        arrival.check_written(file)
        base = _base(session, caller.project_id, model)
    # A protocol does not say that its classes can be hashed.
    template = templates.load(storage, base.prefix, base.manifest_sha256 or "")  # type: ignore[arg-type]
    encoder = encoder_of_any(loss_on, columns)
    try:
        made = preview.make(storage.read(file.key), template, encoder, model=model, rows=rows, max_tokens=max_tokens)
    except InvalidTrainingFile as error:
        raise InvalidValue(param="file_id", reason=str(error.fields["reason"])) from error
    return _answer(made, file_id, file.filename, format)


def _base(session: Session, project_id: str, name: str) -> Model:
    """Returns the base that a model is or was made from. Raises ModelNotFound, WrongState."""
    found = registry.find_ready(session, project_id, name)
    return found if found.base_id is None else session.get_one(Model, found.base_id)


def _answer(made: Preview, file_id: str, filename: str, format: str) -> FilePreview | Response:
    if format == "json":
        return FilePreview(file=file_id, **dict(made))
    page = preview_page.draw(made, filename)
    return Response(page, media_type="text/html", headers={"content-security-policy": preview_page.POLICY})
