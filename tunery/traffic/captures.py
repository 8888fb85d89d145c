"""Captures requests to a model for a project, stores feedback on the answers, and makes files of both."""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Select, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import paging
from tunery.datasets.model import File
from tunery.errors import NotFound
from tunery.models.model import Model
from tunery.traffic.errors import NothingCaptured
from tunery.traffic.model import Capture, CapturedFile, CapturedRequest

Lines = Iterator[tuple[str, bytes]]
Kept = Literal["good", "corrected", "unrated"]
Rated = Literal["good", "bad", "corrected", "unrated"]
_BATCH = 500
_IS_KEPT = CapturedRequest.expires_at > func.clock_timestamp()
"""Expired requests are removed later, by the sweeper."""
_RATED: dict[Rated, ColumnElement[bool]] = {
    "good": CapturedRequest.rating == 1,
    "bad": CapturedRequest.rating == -1,
    "corrected": CapturedRequest.correction.is_not(None),
    "unrated": CapturedRequest.rating.is_(None) & CapturedRequest.correction.is_(None),
}


class FileOrder(BaseModel):
    """Which captured requests a file is made of, and how they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["chat", "preference"] = Field(
        "chat",
        description="`chat`: rows for training or testing; `preference`: pairs of a corrected and the given answer",
    )
    answers: list[Kept] = Field(
        ["good", "corrected"],
        min_length=1,
        description="Rated as good, corrected, or neither. For `preference`, always the corrected ones",
    )


def start(session: Session, project_id: str, model: Model, *, keep_days: int) -> Capture:
    """Starts to keep the project's requests to a model; requests kept earlier keep their expiry."""
    row = session.get(Capture, (project_id, model.id)) or Capture(project_id=project_id, model_id=model.id)
    row.keep_days = keep_days
    session.add(row)
    session.flush()
    return row


def stop(session: Session, project_id: str, model: Model) -> int:
    """Stops keeping requests and removes the kept ones. Returns their number."""
    session.execute(delete(Capture).where(Capture.project_id == project_id, Capture.model_id == model.id))
    removed = session.scalars(_of(project_id, model).with_for_update()).all()
    for row in removed:
        session.delete(row)
    session.flush()
    return len(removed)


def setting(session: Session, project_id: str, model_id: str) -> Capture | None:
    """Returns the project's capture setting for a model; None if it keeps nothing."""
    return session.get(Capture, (project_id, model_id))


def counts(session: Session, project_id: str, model: Model) -> dict[str, int]:
    """Returns the number of kept requests, and how many were rated as good or bad, or corrected."""
    shown: tuple[Rated, ...] = ("good", "bad", "corrected")
    rated = (func.count().filter(_RATED[name]) for name in shown)
    found = session.execute(_of(project_id, model).with_only_columns(func.count(), *rated)).one()
    return dict(zip(("requests", *shown), found, strict=True))


def list_page(
    session: Session,
    project_id: str,
    model: Model,
    *,
    rated: Rated | None = None,
    after: str | None = None,
    limit: int,
) -> tuple[list[CapturedRequest], bool]:
    """One page of the requests to a model, newest first, and whether more follow. `rated`: those alone. Raises NotFound
    for an `after` that is not a request to the model."""
    shown = [] if rated is None else [_RATED[rated]]
    return paging.page(
        session,
        _of(project_id, model),
        *shown,
        by=(CapturedRequest.created_at, CapturedRequest.id),
        id=CapturedRequest.id,
        kind="captured request",
        after=after,
        limit=limit,
    )


def add(
    session: Session,
    capture: Capture,
    id: str,
    *,
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    finish_reason: str,
) -> None:
    """Stores one answered request, already redacted. Of two with the same id the first is kept."""
    row = insert(CapturedRequest).values(
        id=id,
        project_id=capture.project_id,
        model_id=capture.model_id,
        request=dict(request),
        answer=dict(answer),
        finish_reason=finish_reason,
        expires_at=func.clock_timestamp() + timedelta(days=capture.keep_days),
    )
    session.execute(row.on_conflict_do_nothing())


def rate(
    session: Session, project_id: str, id: str, *, rating: int | None, correction: Mapping[str, Any] | None
) -> CapturedRequest:
    """Stores feedback on an answer; None keeps the earlier value. `correction`: already redacted. Raises NotFound."""
    row = session.scalar(
        select(CapturedRequest)
        .where(CapturedRequest.id == id, CapturedRequest.project_id == project_id, _IS_KEPT)
        .with_for_update()
    )
    if row is None:
        raise NotFound(kind="captured request", id=id, param="id")
    row.rating = row.rating if rating is None else rating
    row.correction = row.correction if correction is None else dict(correction)
    session.flush()
    return row


def lines(session: Session, project_id: str, model: Model, order: FileOrder) -> Lines:
    """Returns the rows of a file, oldest first: the captured request's id, and its line."""
    last: tuple[Any, str] | None = None
    while True:
        query = _of(project_id, model).order_by(CapturedRequest.created_at, CapturedRequest.id).limit(_BATCH)
        if last is not None:
            after = (CapturedRequest.created_at, CapturedRequest.id)
            query = query.where(func.row(*after) > func.row(*last))
        rows = session.scalars(query).all()
        for row in rows:
            if (made := _row(row, order)) is not None:
                yield row.id, json.dumps(made, ensure_ascii=False).encode() + b"\n"
        if len(rows) < _BATCH:
            return
        last = (rows[-1].created_at, rows[-1].id)
        session.expunge_all()


def _row(row: CapturedRequest, order: FileOrder) -> dict[str, Any] | None:
    """Returns a row of the file; None for a request that the order excludes."""
    if order.format == "preference":
        if row.correction is None or row.correction == row.answer:
            return None
        answers = {"preferred_output": [row.correction], "non_preferred_output": [row.answer]}
        return {"input": dict(row.request), **answers}
    kind: Kept | None = "corrected" if row.correction is not None else _kind(row)
    if kind not in order.answers:
        return None
    return {**row.request, "messages": [*row.request["messages"], row.correction or row.answer]}


def _kind(row: CapturedRequest) -> Kept | None:
    """Returns the kind of an uncorrected answer; None for a bad one, and for one cut by the token limit."""
    if row.finish_reason == "length" or row.rating == -1:
        return None
    return "good" if row.rating == 1 else "unrated"


def note_file(session: Session, file: File, model: Model, order: FileOrder, used: list[str]) -> CapturedFile:
    """Stores and returns the lineage of a file. Raises NothingCaptured if it has no rows."""
    if not used:
        raise NothingCaptured(id=model.id)
    outcome = {"rows": len(used), "requests": used, "manifest_sha256": model.manifest_sha256}
    row = CapturedFile(file_id=file.id, model_id=model.id, order=order.model_dump(), outcome=outcome)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def find_file(session: Session, file: File) -> CapturedFile:
    """Returns the lineage of a file made of captured requests. Raises NotFound."""
    row = session.get(CapturedFile, file.id)
    if row is None:
        raise NotFound(kind="file of captured requests", id=file.id)
    return row


def _of(project_id: str, model: Model) -> Select[CapturedRequest]:
    mine = (CapturedRequest.project_id == project_id, CapturedRequest.model_id == model.id)
    return select(CapturedRequest).where(*mine, _IS_KEPT)
