"""Exports of jobs' models: one at a time per model, requested here and made by an I/O worker."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import dispatch
from tunery.errors import InvalidValue, Unsupported, WrongState
from tunery.models.model import Model
from tunery.spec import Columns, Export

QUEUED, DONE, FAILED = "queued", "succeeded", "failed"


def ask(
    session: Session, model: Model, asked: Export, rows_file: str | None = None, columns: Columns | None = None
) -> dict[str, Any]:
    """Queues an export, replacing the model's last one; a merge is tested on the rows of `rows_file` first, which are
    read by `columns`, or else as the job's own.

    Raises InvalidValue, Unsupported, WrongState.
    """
    if model.kind == "base":
        instead = "Name a fine-tuned model: a base needs no export."
        raise Unsupported(param="model", what=f"An export of the base '{model.id}'", instead=instead)
    if not asked.is_asked:
        raise InvalidValue(param="merged", reason="The export is empty. Set merged, fp8, gguf or adapter_gguf.")
    if model.technique == "full" and (asked.merged or asked.adapter_gguf):
        param = "merged" if asked.merged else "adapter_gguf"
        raise InvalidValue(param=param, reason=f"A full fine-tune has no adapter. Leave {param} out.")
    if rows_file is None and model.job_id is None and asked.needs_merge:
        reason = (
            f"No job trained '{model.id}', so there are no rows to verify its merge. Name a file of rows as "
            "'rows_file'."
        )
        raise InvalidValue(param="rows_file", reason=reason)
    if columns is not None and rows_file is None:
        reason = (
            "The job's own files are read by its columns. Name the file of these as 'rows_file', or leave them out."
        )
        raise InvalidValue(param="columns", reason=reason)
    session.refresh(model, with_for_update=True)
    if model.export is not None and model.export["status"] == QUEUED:
        instead = "Wait until the running export has ended."
        raise WrongState(kind="Model", id=model.id, state="being exported", action="exported again", instead=instead)
    rows = {"rows_file": rows_file, "columns": columns and columns.model_dump()}
    model.export = {"status": QUEUED, "asked": asked.model_dump(), **rows, "results": [], "error": None}
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    return model.export


def waiting(session: Session) -> list[str]:
    """Returns the ids of models with a queued export, oldest model first."""
    query = select(Model.id).where(Model.export["status"].astext == QUEUED, Model.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Model.created_at)))


def finish(session: Session, model_id: str, *, results: list[dict[str, Any]], error: str | None = None) -> Model | None:
    """Stores an export's result; returns its model, or None if it is no longer queued."""
    model = session.get_one(Model, model_id, with_for_update=True)
    if model.export is None or model.export["status"] != QUEUED or model.deleted_at is not None:
        return None
    is_whole = error is None and not any(result["is_refused"] for result in results)
    status = DONE if is_whole else FAILED
    model.export = {**model.export, "status": status, "results": results, "error": error}
    session.flush()
    return model
