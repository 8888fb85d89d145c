"""Creates, finds, lists, checks and deletes files: rows in the database, bytes in storage under generated keys."""

from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.datasets import cleanings, reports
from tunery.datasets.arrival import ArrivalCheck
from tunery.datasets.errors import FileInUse
from tunery.datasets.model import File
from tunery.errors import InvalidValue, NotFound
from tunery.paging import Order, page
from tunery.rows.errors import InvalidRows
from tunery.storage import Storage, Stored
from tunery.storage.errors import ObjectMissing

FINE_TUNE = "fine-tune"
RESULTS = "fine-tune-results"

InUseBy = Callable[[Session, str], str | None]
"""Returns the id of a live job that needs a file. Supplied by the caller, as this layer must not import jobs."""


# --- creating ----------------------------------------------------------------------------------------------------


def new_key() -> str:
    """Returns a storage key for a new file's bytes, which ends in the file's id."""
    return f"files/{ids.new(ids.FILE)}"


def create(
    session: Session,
    project_id: str,
    stored: Stored,
    *,
    purpose: str,
    filename: str,
    checked: bool = True,
    expires_after: int | None = None,
) -> File:
    """Creates the row of stored bytes. `checked`: the file needs no check; else a worker is woken to `process` it.

    `expires_after`: seconds. If the caller's transaction fails, the caller must delete `stored.key`.
    """
    file = File(
        id=stored.key.rpartition("/")[2],
        project_id=project_id,
        purpose=purpose,
        filename=filename,
        bytes=stored.bytes,
        sha256=stored.sha256,
        key=stored.key,
        status="processed" if checked else "uploaded",
        expires_at=None if expires_after is None else func.clock_timestamp() + timedelta(seconds=expires_after),
    )
    session.add(file)
    session.flush()
    session.refresh(file)
    if not checked:
        dispatch.nudge_after_commit(session, dispatch.IO)
    elif purpose == FINE_TUNE:
        reports.request(session, file)
    return file


# --- finding ------------------------------------------------------------------------------------------------------


def _is_visible() -> ColumnElement[bool]:
    return File.deleted_at.is_(None) & (File.expires_at.is_(None) | (File.expires_at > func.clock_timestamp()))


def find(session: Session, project_id: str, file_id: str, *, param: str | None = None) -> File:
    """Returns the project's file. Raises NotFound, also for another project's, a deleted or an expired file."""
    file = session.scalar(select(File).where(File.project_id == project_id, File.id == file_id, _is_visible()))
    if file is None:
        raise NotFound(param=param, kind="file", id=file_id)
    return file


def known_contents(session: Session, digests: Collection[str]) -> set[str]:
    """Returns those of the sha256 digests that some file of any project has."""
    return set(session.scalars(select(File.sha256).where(File.sha256.in_(digests), _is_visible())))


def list_page(
    session: Session,
    project_id: str,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 10_000,
    order: Order = "desc",
) -> tuple[list[File], bool]:
    """Returns one page by creation time, and whether more follow. Raises NotFound for an unknown `after`."""
    owned = select(File).where(File.project_id == project_id)
    shown = [_is_visible()] if purpose is None else [_is_visible(), File.purpose == purpose]
    by = (File.created_at, File.id)
    return page(session, owned, *shown, by=by, id=File.id, kind="file", after=after, limit=limit, order=order)


def check_trainable(file: File, *, param: str) -> None:
    """Raises InvalidValue for a file that a job must not use; one that is still processing is allowed."""
    if file.status == "error":
        reason = f"File '{file.id}' cannot be used for training. {file.status_details or 'It could not be read.'}"
        raise InvalidValue(param=param, reason=reason)
    if not file.sha256:  # a job records the digest of its inputs
        reason = f"File '{file.id}' is still being written. Wait until its status is 'processed'."
        raise InvalidValue(param=param, reason=reason)
    if file.purpose != FINE_TUNE:
        raise InvalidValue(
            param=param,
            reason=f"File '{file.id}' has the purpose '{file.purpose}'. Upload it again with purpose 'fine-tune'.",
        )


# --- checking -----------------------------------------------------------------------------------------------------


def next_unprocessed(session: Session, *, skip: Sequence[str] = ()) -> File | None:
    """Returns the oldest unchecked file, locked for this transaction, so that two workers never get the same one.

    An expired file counts while its bytes exist, because an older job may wait for it.
    """
    return session.scalar(
        select(File)
        .where(File.status == "uploaded", File.purged_at.is_(None), File.id.not_in(skip), ~cleanings.is_made())
        .order_by(File.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def process(session: Session, storage: Storage, file: File) -> None:
    """Reads an unchecked file and sets its status. If storage is down it stays unchecked."""
    try:
        checker = ArrivalCheck()
        for chunk in storage.read(file.key):
            checker.feed(chunk)
        checker.close()
    except (InvalidRows, ObjectMissing) as error:
        file.status, file.status_details = "error", error.message
        session.flush()
        reports.note(session, file, "failed")
    else:
        file.status = "processed"
        session.flush()
        reports.request(session, file)


# --- deleting --------------------------------------------------------------------------------------------------------


def delete(session: Session, file: File, *, in_use_by: str | None) -> None:
    """Hides the file; `purge` removes its bytes. Raises FileInUse when a live job (its id) needs it."""
    if in_use_by is not None:
        raise FileInUse(file=file.id, job=in_use_by)
    file.deleted_at = func.clock_timestamp()
    session.flush()


def purge(session: Session, storage: Storage, in_use_by: InUseBy, *, limit: int = 100) -> int:
    """Removes the bytes of deleted and expired files that no live job needs; returns the number of files.

    Bytes first, then the row: after a crash in between the deletion is repeated, which is harmless; the other order
    would leave bytes without a row.
    """
    expired = (File.expires_at <= func.clock_timestamp()) & File.deleted_at.is_(None)
    session.execute(update(File).where(expired).values(deleted_at=File.expires_at))
    gone = session.scalars(
        select(File)
        .where(File.deleted_at.is_not(None), File.purged_at.is_(None))
        .order_by(File.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    purged = [file for file in gone if in_use_by(session, file.id) is None]
    for file in purged:
        storage.delete(file.key)
        reports.remove(session, storage, file)
        cleanings.forget(session, file)
        file.purged_at = func.clock_timestamp()
    session.flush()
    return len(purged)
