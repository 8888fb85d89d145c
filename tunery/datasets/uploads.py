"""Uploads: a large file in parts, sent in any order and joined in the order that its owner names.

Bytes and rows are written in separate steps, so that no transaction is open while gigabytes are copied: a part is
stored, then `add_part`; parts are `join`ed, then `complete`.
"""

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery import ids
from tunery.datasets import files
from tunery.datasets.model import File, Upload, UploadPart
from tunery.errors import InvalidValue, NotFound, TooLarge, WrongState
from tunery.storage import Storage, Stored

LIFETIME = timedelta(hours=1)
PENDING, COMPLETED, CANCELLED, EXPIRED = "pending", "completed", "cancelled", "expired"


def create(
    session: Session,
    project_id: str,
    *,
    bytes: int,
    filename: str,
    mime_type: str,
    purpose: str,
    limit: int,
    file_expires_after: int | None = None,
) -> Upload:
    """Announces a file of `bytes` bytes. Raises TooLarge beyond `limit`."""
    if bytes > limit:
        raise TooLarge(
            param="bytes", what="The file", limit=limit, instead="Split it, or ask the operator to raise the limit."
        )
    upload = Upload(
        id=ids.new(ids.UPLOAD),
        project_id=project_id,
        purpose=purpose,
        filename=filename,
        mime_type=mime_type,
        bytes=bytes,
        status=PENDING,
        file_expires_after=file_expires_after,
        expires_at=func.clock_timestamp() + LIFETIME,
    )
    session.add(upload)
    session.flush()
    session.refresh(upload)
    return upload


def find(session: Session, project_id: str, upload_id: str, *, lock: bool = False) -> Upload:
    """Returns a project's own Upload. Raises NotFound."""
    query = select(Upload).where(Upload.project_id == project_id, Upload.id == upload_id)
    upload = session.scalar(query.with_for_update() if lock else query)
    if upload is None:
        raise NotFound(kind="upload", id=upload_id)
    return upload


def check_pending(session: Session, upload: Upload, action: str) -> None:
    """Raises WrongState unless the Upload still takes parts. `action`: what was tried, as in "cannot be cancelled"."""
    out_of_time = session.scalar(select(Upload.expires_at <= func.clock_timestamp()).where(Upload.id == upload.id))
    state = EXPIRED if upload.status == PENDING and out_of_time else upload.status
    if state != PENDING:
        raise _wrong_state(upload, state, action)


def _wrong_state(upload: Upload, state: str, action: str) -> WrongState:
    return WrongState(kind="Upload", id=upload.id, state=state, action=action, instead="Create a new Upload.")


def new_part_key(upload_id: str) -> str:
    """Returns where a part's bytes lie. The key ends in the part's id."""
    return f"uploads/{upload_id}/{ids.new(ids.PART)}"


def add_part(session: Session, upload: Upload, stored: Stored, *, limit: int) -> UploadPart:
    """Returns the row of a stored part. Raises WrongState, or TooLarge when all parts together exceed `limit` bytes.

    Parts that are sent again count too: a client that retries a part gets a new id and names the one that it wants.
    """
    check_pending(session, upload, "given more parts")
    there = session.scalar(select(func.sum(UploadPart.bytes)).where(UploadPart.upload_id == upload.id)) or 0
    if there + stored.bytes > limit:
        raise TooLarge(what=f"Upload '{upload.id}'", limit=limit, instead="Cancel it and create a new one.")
    part = UploadPart(
        id=stored.key.rpartition("/")[2],
        upload_id=upload.id,
        bytes=stored.bytes,
        sha256=stored.sha256,
        key=stored.key,
    )
    session.add(part)
    session.flush()
    session.refresh(part)
    return part


def completed(session: Session, upload: Upload) -> File | None:
    """The Upload's file if it has been completed before: who lost that answer asks again. Raises NotFound when the
    file was deleted since."""
    return None if upload.file_id is None else files.find(session, upload.project_id, upload.file_id)


def choose(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """The parts to join, in the order of `part_ids`. Raises WrongState, or InvalidValue where they are not the file."""
    check_pending(session, upload, "completed")
    known = {part.id: part for part in session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id))}
    for part_id in part_ids:
        if part_id not in known:
            raise InvalidValue(param="part_ids", reason=f"Upload '{upload.id}' has no part '{part_id}'.")
    if len(set(part_ids)) < len(part_ids):
        raise InvalidValue(param="part_ids", reason="A part is named twice. Name every part once, in the file's order.")
    parts = [known[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in parts)
    if total != upload.bytes:
        raise InvalidValue(
            param="part_ids",
            reason=f"The named parts have {total} bytes in total, but the Upload was created for {upload.bytes} bytes.",
        )
    return parts


def join(storage: Storage, parts: Sequence[UploadPart], md5: str | None) -> Stored:
    """The parts as one object, streamed. Raises InvalidValue when it has another md5; nothing is stored then."""
    found = hashlib.md5(usedforsecurity=False)
    with storage.writer(files.new_key()) as writer:
        for part in parts:
            for chunk in storage.read(part.key):
                found.update(chunk)
                writer.write(chunk)
        if md5 is not None and md5.lower() != found.hexdigest():
            raise InvalidValue(
                param="md5", reason=f"The joined parts have the md5 {found.hexdigest()}, not {md5}. Send them again."
            )
    return writer.stored


def complete(session: Session, upload: Upload, stored: Stored) -> File:
    """The Upload's file, of the joined bytes. A training file waits for a worker to check it. Raises WrongState.

    `upload` must be locked: of two that complete it at once, the second gets the file of the first, and the bytes that
    it joined are nobody's: delete `stored.key` unless it is the file's. Its time may have run out
    while the parts were joined; that is no reason to throw them away.
    """
    if (done := completed(session, upload)) is not None:
        return done
    if upload.status != PENDING:
        raise _wrong_state(upload, upload.status, "completed")
    file = files.create(
        session,
        upload.project_id,
        stored,
        purpose=upload.purpose,
        filename=upload.filename,
        checked=upload.purpose != files.FINE_TUNE,
        expires_after=upload.file_expires_after,
    )
    upload.status, upload.file_id = COMPLETED, file.id
    session.flush()
    return file


def cancel(session: Session, upload: Upload) -> Upload:
    """Cancels an Upload; `sweep` removes its parts. Raises WrongState."""
    check_pending(session, upload, "cancelled")
    upload.status = CANCELLED
    session.flush()
    return upload


def sweep(session: Session, storage: Storage, *, limit: int = 1000) -> int:
    """Expires old Uploads, and removes the parts of ended ones; returns the number of parts.

    Parts are kept for another LIFETIME, as they may still be being joined.
    """
    session.execute(
        update(Upload)
        .where(Upload.status == PENDING, Upload.expires_at <= func.clock_timestamp() - LIFETIME)
        .values(status=EXPIRED)
        .execution_options(synchronize_session=False)
    )
    parts = session.scalars(
        select(UploadPart)
        .join(Upload, Upload.id == UploadPart.upload_id)
        .where(Upload.status != PENDING)
        .limit(limit)
        .with_for_update(of=UploadPart, skip_locked=True)
    ).all()
    for part in parts:
        storage.delete(part.key)
        session.delete(part)
    session.flush()
    return len(parts)
