"""Scorecards of adapters without training: one at a time per model, requested here and made by an I/O worker."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import dispatch
from tunery.errors import InvalidValue, Unsupported, WrongState
from tunery.models.exports import DONE, FAILED, QUEUED
from tunery.models.model import Model
from tunery.spec import Columns, Evaluation


def ask(session: Session, model: Model, evaluation: Evaluation, columns: Columns | None = None) -> None:
    """Queues a scorecard, replacing the model's last one; `columns` are those of the test file.

    Raises InvalidValue, Unsupported, WrongState.
    """
    if model.kind == "base" or model.technique == "full":
        what, instead = f"A scorecard of '{model.id}' alone", "Name an adapter: it is compared with its base."
        raise Unsupported(param="model", what=what, instead=instead)
    if evaluation.test_file is None:
        raise InvalidValue(param="evaluation.test_file", reason="Name the file whose rows both models answer.")
    for name in ("every_steps", "task_rows"):
        if name in evaluation.model_fields_set:
            reason = f"Nothing is trained, so evaluation.{name} has no effect. Leave it out."
            raise InvalidValue(param=f"evaluation.{name}", reason=reason)
    if evaluation.unquantised and model.technique != "qlora":
        reason = "The adapter's base is not quantised, so there is nothing else to score. Leave it out."
        raise InvalidValue(param="evaluation.unquantised", reason=reason)
    session.refresh(model, with_for_update=True)
    if model.scoring is not None and model.scoring["status"] == QUEUED:
        instead = "Wait until the running scorecard has ended."
        raise WrongState(kind="Model", id=model.id, state="being scored", action="scored again", instead=instead)
    asked = {"evaluation": evaluation.model_dump(mode="json"), "columns": columns and columns.model_dump()}
    model.scoring = {"status": QUEUED, **asked, "scorecard": None, "error": None}
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)


def waiting(session: Session) -> list[str]:
    """Returns the ids of the models to score, oldest model first."""
    query = select(Model.id).where(Model.scoring["status"].astext == QUEUED, Model.deleted_at.is_(None))
    return list(session.scalars(query.order_by(Model.created_at)))


def finish(
    session: Session, model_id: str, *, scorecard: dict[str, Any] | None = None, error: str | None = None
) -> Model | None:
    """Stores a scorecard's result; returns its model, or None if it is no longer queued."""
    model = session.get_one(Model, model_id, with_for_update=True)
    if model.scoring is None or model.scoring["status"] != QUEUED or model.deleted_at is not None:
        return None
    status = DONE if error is None else FAILED
    model.scoring = {**model.scoring, "status": status, "scorecard": scorecard, "error": error}
    session.flush()
    return model
