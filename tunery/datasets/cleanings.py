"""Cleanings of uploaded files: requested here, run by an I/O worker, stored with the file that they make."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from sqlalchemy import ColumnElement, exists, select, update
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.datasets import arrival, reports
from tunery.datasets.cleaning.order import Cleaning, check_other
from tunery.datasets.model import File, FileCleaning
from tunery.errors import NotFound
from tunery.storage import Stored

MAX_TRIES = 3
"""Workers that may die during one cleaning before it fails."""
_LOST = "The worker stopped {tries} times before it had cleaned the file. Look for very large rows."


def request(
    session: Session, source: File, order: Cleaning, *, against: File | None = None, base: str | None = None
) -> File:
    """Creates the new file, whose bytes a worker will write. `base`: the id of the model whose tokenizer counts.

    Raises InvalidValue, NoReport, WrongState.
    """
    reports.check_reported(source)
    for file in (source, against):
        if file is not None:
            arrival.check_written(file)
    if against is not None:
        check_other(source.sha256, against.sha256)
    judged = base is not None and reports.judged(session, source, base, order.columns) is not None
    order.check(compared=against is not None, measured=base is not None, uploaded=True, judged=judged)
    made = _add(session, source, "clean")
    held_out = _add(session, source, "held-out") if order.held_out is not None else None
    session.add(
        FileCleaning(
            file_id=made.id,
            source_id=source.id,
            against_id=against.id if against else None,
            base_id=base,
            held_out_id=held_out.id if held_out else None,
            order=order.model_dump(mode="json"),
        )
    )
    session.flush()
    dispatch.nudge_after_commit(session, dispatch.IO)
    return made


def _add(session: Session, source: File, what: str) -> File:
    id = ids.new(ids.FILE)
    name = f"{PurePath(source.filename).stem[:200]}-{what}.jsonl"
    file = File(id=id, project_id=source.project_id, purpose=source.purpose, filename=name, bytes=0, sha256="")
    file.key, file.status = f"files/{id}", "uploaded"
    session.add(file)
    session.flush()
    session.refresh(file)
    return file


def is_made() -> ColumnElement[bool]:
    """Returns the condition that a File comes from a cleaning, whose worker sets its status."""
    return exists().where((FileCleaning.file_id == File.id) | (FileCleaning.held_out_id == File.id))


def find(session: Session, file: File) -> FileCleaning:
    """Returns the cleaning that made a file. Raises NotFound."""
    of_file = (FileCleaning.file_id == file.id) | (FileCleaning.held_out_id == file.id)
    found = session.scalar(select(FileCleaning).where(of_file))
    if found is None:
        raise NotFound(kind="cleaned file", id=file.id)
    return found


def waiting(session: Session) -> list[str]:
    """Returns the ids of the files to write, oldest first."""
    query = select(FileCleaning.file_id).join(File, File.id == FileCleaning.file_id)
    return list(session.scalars(query.where(File.status == "uploaded").order_by(FileCleaning.created_at)))


def begin(session: Session, file_id: str) -> FileCleaning | None:
    """Returns the cleaning to run; None if it is no longer wanted or too many workers have died during it."""
    file = session.get_one(File, file_id, with_for_update=True)
    cleaning = session.get_one(FileCleaning, file_id)
    if file.status != "uploaded":
        return None
    if file.deleted_at is not None or cleaning.tries >= MAX_TRIES:
        fail(session, cleaning, _LOST.format(tries=cleaning.tries))
        return None
    cleaning.tries, cleaning.progress = cleaning.tries + 1, 0.0
    session.flush()
    return cleaning


def release(session: Session, file_id: str) -> None:
    """Requeues a cleaning that an outage or a shutdown interrupted, without counting a try."""
    begun = (FileCleaning.file_id == file_id) & (FileCleaning.tries > 0) & FileCleaning.outcome.is_(None)
    session.execute(update(FileCleaning).where(begun).values(tries=FileCleaning.tries - 1))


def show_progress(session: Session, file_id: str, fraction: float) -> None:
    """Stores the progress of a cleaning, 0 to 1."""
    session.execute(update(FileCleaning).where(FileCleaning.file_id == file_id).values(progress=fraction))


def finish(
    session: Session, cleaning: FileCleaning, outcome: dict[str, Any], stored: Mapping[str, Stored]
) -> list[str]:
    """Stores what was done, and the bytes of each written file by its id. Requests their reports.

    Returns the keys of files that were deleted meanwhile, whose bytes the caller must remove.
    """
    cleaning.outcome, cleaning.progress = outcome, 1.0
    purged = []
    for id, written in stored.items():
        file = session.get_one(File, id, with_for_update=True)
        file.bytes, file.sha256, file.status = written.bytes, written.sha256, "processed"
        session.flush()
        if file.purged_at is not None:
            purged.append(file.key)
        else:
            reports.request(session, file)
    return purged


def fail(session: Session, cleaning: FileCleaning, reason: str) -> None:
    """Stores why there is no new file."""
    for id in filter(None, (cleaning.file_id, cleaning.held_out_id)):
        file = session.get_one(File, id, with_for_update=True)
        file.status, file.status_details = "error", reason
        session.flush()
        reports.note(session, file, "failed")


def forget(session: Session, file: File) -> None:
    """Removes row contents from a file's lineage, when its bytes are removed."""
    cleaning = session.get(FileCleaning, file.id)
    if cleaning is not None and cleaning.outcome is not None:
        kept = {name: cleaning.outcome[name] for name in ("counts", "kinds", "source_sha256")}
        cleaning.outcome = {**cleaning.outcome, **kept, "dropped": [], "changed": []}
