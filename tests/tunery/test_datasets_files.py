"""Files and Uploads against PostgreSQL and a real directory."""

import gzip
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery import ids
from tunery.datasets import files, uploads
from tunery.datasets.errors import FileInUse
from tunery.datasets.model import File, Upload, UploadPart
from tunery.errors import InvalidValue, NotFound, TooLarge, WrongState
from tunery.jobs import ledger
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.storage import Directory, Storage, open_storage
from tunery.storage.errors import ObjectMissing

LIMIT = 1000
GOOD = b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n'


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Directory(tmp_path / "objects")


@pytest.fixture
def owner(session: Session) -> Project:
    return rows.project(session)


def put(session: Session, storage: Storage, owner: Project, data: bytes = GOOD, **values: Any) -> File:
    fields = {"purpose": files.FINE_TUNE, "filename": "a.jsonl"} | values
    return files.create(session, owner.id, storage.put(files.new_key(), data), **fields)


def make_upload(session: Session, owner: Project, size: int, **values: Any) -> Upload:
    fields: dict[str, Any] = {
        "filename": "a.jsonl",
        "mime_type": "text/jsonl",
        "purpose": files.FINE_TUNE,
        "limit": LIMIT,
    }
    return uploads.create(session, owner.id, bytes=size, **fields | values)


def add_part(session: Session, storage: Storage, upload: Upload, data: bytes) -> UploadPart:
    return uploads.add_part(session, upload, storage.put(uploads.new_part_key(upload.id), data), limit=LIMIT)


def finish(session: Session, storage: Storage, upload: Upload, parts: list[UploadPart], md5: str | None = None) -> File:
    chosen = uploads.choose(session, upload, [part.id for part in parts])
    return uploads.complete(session, upload, uploads.join(storage, chosen, md5))


def run_out(session: Session, upload: Upload, ago: timedelta = timedelta(seconds=1)) -> None:
    session.execute(update(Upload).where(Upload.id == upload.id).values(expires_at=func.clock_timestamp() - ago))
    session.refresh(upload)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_stored_file_is_found_by_its_project_only(session: Session, storage: Storage, owner: Project) -> None:
    file = put(session, storage, owner)
    other = rows.project(session)

    assert files.find(session, owner.id, file.id) is file
    assert (file.bytes, file.sha256, file.status) == (len(GOOD), hashlib.sha256(GOOD).hexdigest(), "processed")
    assert file.id.startswith(ids.FILE)
    with pytest.raises(NotFound) as foreign:
        files.find(session, other.id, file.id)
    with pytest.raises(NotFound) as unknown:
        files.find(session, other.id, "file-x")
    assert foreign.value.message.replace(file.id, "file-x") == unknown.value.message
    assert files.list_page(session, other.id) == ([], False)


def test_pages_stay_put_while_files_come_and_go(session: Session, storage: Storage, owner: Project) -> None:
    made = [put(session, storage, owner) for _ in range(5)]
    newest = [file.id for file in reversed(made)]

    page, more = files.list_page(session, owner.id, limit=2)
    assert ([file.id for file in page], more) == (newest[:2], True)
    put(session, storage, owner)
    files.delete(session, page[-1], in_use_by=None)

    rest, more = files.list_page(session, owner.id, limit=3, after=page[-1].id)
    assert ([file.id for file in rest], more) == (newest[2:], False)


def test_lists_go_both_ways_and_by_purpose(session: Session, storage: Storage, owner: Project) -> None:
    made = [put(session, storage, owner, purpose=purpose) for purpose in ("fine-tune", "batch", "fine-tune")]

    oldest, _ = files.list_page(session, owner.id, order="asc")
    assert oldest == made
    assert files.list_page(session, owner.id, order="asc", after=made[0].id) == (made[1:], False)
    assert files.list_page(session, owner.id, purpose="batch") == ([made[1]], False)


def test_a_foreign_cursor_is_refused(session: Session, storage: Storage, owner: Project) -> None:
    file = put(session, storage, rows.project(session))

    with pytest.raises(NotFound) as caught:
        files.list_page(session, owner.id, after=file.id)
    assert caught.value.param == "after"


def test_an_expired_file_is_gone(session: Session, storage: Storage, owner: Project) -> None:
    kept = put(session, storage, owner, expires_after=3600)
    assert kept.expires_at is not None
    assert kept.expires_at - kept.created_at == pytest.approx(timedelta(hours=1), abs=timedelta(seconds=5))
    gone = put(session, storage, owner, expires_after=-1)

    assert files.list_page(session, owner.id) == ([kept], False)
    with pytest.raises(NotFound):
        files.find(session, owner.id, gone.id)


def test_only_fine_tune_files_are_trained_on(session: Session, storage: Storage, owner: Project) -> None:
    files.check_trainable(put(session, storage, owner), param="training_file")
    with pytest.raises(InvalidValue, match=r"purpose 'batch'\. Upload it again with purpose 'fine-tune'"):
        files.check_trainable(put(session, storage, owner, purpose="batch"), param="training_file")


def test_a_file_that_a_live_job_uses_stays(session: Session, storage: Storage) -> None:
    job = rows.job(session, state=State.RUNNING)
    file = session.get_one(File, job.training_file)

    with pytest.raises(FileInUse, match=f"used by job '{job.id}'"):
        files.delete(session, file, in_use_by=ledger.live_job_using(session, file.id))
    assert file.deleted_at is None


def test_bytes_go_with_the_last_job_that_needs_them(session: Session, storage: Storage, owner: Project) -> None:
    free, used = put(session, storage, owner), put(session, storage, owner, expires_after=-1)
    job = rows.job(session, owner, training_file=used.id)
    files.delete(session, free, in_use_by=None)

    assert files.purge(session, storage, ledger.live_job_using) == 1
    assert (storage.stat(free.key), storage.stat(used.key)) == (None, len(GOOD))
    ledger.cancel(session, owner.id, job.id)
    assert files.purge(session, storage, ledger.live_job_using) == 1
    assert storage.stat(used.key) is None
    assert files.purge(session, storage, ledger.live_job_using) == 0


@pytest.mark.parametrize(
    ("data", "status", "details"),
    [
        (GOOD * 3, "processed", None),
        (GOOD + b"{", "error", "Line 2: the object does not end"),
        (b"", "error", "empty"),
        (gzip.compress(GOOD * 3, mtime=0), "processed", None),
    ],
)
def test_a_worker_settles_what_was_not_checked(
    session: Session, storage: Storage, owner: Project, data: bytes, status: str, details: str | None
) -> None:
    file = put(session, storage, owner, data, checked=False)
    assert file.status == "uploaded"

    files.process(session, storage, file)

    assert file.status == status
    assert (details or "") in (file.status_details or "")
    assert files.next_unprocessed(session) is None


def test_a_job_that_waits_for_an_expired_file_gets_its_verdict(
    session: Session, storage: Storage, owner: Project
) -> None:
    file = put(session, storage, owner, checked=False, expires_after=-1)
    job = rows.job(session, owner, training_file=file.id)
    assert files.purge(session, storage, ledger.live_job_using) == 0
    assert ledger.next_to_validate(session) is None

    assert files.next_unprocessed(session) is file
    files.process(session, storage, file)

    assert (file.status, ledger.next_to_validate(session)) == ("processed", job)


def test_a_file_without_bytes_is_not_checked(session: Session, storage: Storage, owner: Project) -> None:
    files.delete(session, put(session, storage, owner, checked=False), in_use_by=None)
    assert files.purge(session, storage, ledger.live_job_using) == 1
    assert files.next_unprocessed(session) is None


def test_a_file_whose_bytes_are_lost_is_in_error(session: Session, storage: Storage, owner: Project) -> None:
    file = put(session, storage, owner, checked=False)
    storage.delete(file.key)

    files.process(session, storage, file)

    assert file.status == "error"


def test_two_workers_never_check_one_file(database: Database, storage: Storage) -> None:
    with database.sessions.begin() as session:
        owner = rows.project(session)
        wanted = {put(session, storage, owner, checked=False).id for _ in range(2)}

    with database.sessions() as one, database.sessions() as other, database.sessions() as third:
        taken = [files.next_unprocessed(session) for session in (one, other)]
        assert {file.id for file in taken if file} == wanted
        assert files.next_unprocessed(third) is None


# --- uploads ------------------------------------------------------------------------------------------------------


def test_parts_are_joined_in_the_order_that_is_named(session: Session, storage: Storage, owner: Project) -> None:
    data = GOOD * 4
    upload = make_upload(session, owner, len(data), file_expires_after=7200)
    late, early, wrong = (add_part(session, storage, upload, piece) for piece in (data[9:], data[:9], b"sent again"))

    file = finish(session, storage, upload, [early, late], hashlib.md5(data).hexdigest().upper())

    assert b"".join(storage.read(file.key)) == data
    assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (file.status, upload.status, upload.file_id) == ("uploaded", "completed", file.id)
    assert file.expires_at is not None
    assert uploads.sweep(session, storage) == 3
    assert storage.stat(wrong.key) is None
    assert list(storage.list("uploads/")) == []
    assert storage.stat(file.key) == len(data)


def test_other_purposes_need_no_check(session: Session, storage: Storage, owner: Project) -> None:
    upload = make_upload(session, owner, 3, purpose="user_data")

    assert finish(session, storage, upload, [add_part(session, storage, upload, b"\xff\x00x")]).status == "processed"


def test_parts_that_are_not_the_file_are_refused(session: Session, storage: Storage, owner: Project) -> None:
    upload = make_upload(session, owner, 10)
    part = add_part(session, storage, upload, b"12345")
    foreign = add_part(session, storage, make_upload(session, owner, 5), b"12345")

    for chosen, reason in (
        ([part.id], "have 5 bytes in total, but the Upload was created for 10 bytes"),
        ([part.id, part.id], "named twice"),
        ([part.id, foreign.id], f"has no part '{foreign.id}'"),
    ):
        with pytest.raises(InvalidValue, match=reason) as caught:
            uploads.choose(session, upload, chosen)
        assert caught.value.param == "part_ids"


def test_a_wrong_md5_leaves_nothing_and_the_upload_open(session: Session, storage: Storage, owner: Project) -> None:
    upload = make_upload(session, owner, 5)
    part = add_part(session, storage, upload, b"12345")

    with pytest.raises(InvalidValue, match="have the md5 827ccb0eea8a706c4c34a16891f84e7b"):
        finish(session, storage, upload, [part], "0" * 32)

    assert list(storage.list("files/")) == []
    assert finish(session, storage, upload, [part], "827ccb0eea8a706c4c34a16891f84e7b").bytes == 5


def test_sizes_are_limited(session: Session, storage: Storage, owner: Project) -> None:
    with pytest.raises(TooLarge):
        make_upload(session, owner, LIMIT + 1)
    upload = make_upload(session, owner, LIMIT)
    add_part(session, storage, upload, b"x" * (LIMIT - 1))
    with pytest.raises(TooLarge):
        add_part(session, storage, upload, b"xx")


def ends(session: Session, storage: Storage, owner: Project) -> Iterator[tuple[str, Upload]]:
    completed = make_upload(session, owner, 1)
    finish(session, storage, completed, [add_part(session, storage, completed, b"x")])
    yield "completed", completed
    yield "cancelled", uploads.cancel(session, make_upload(session, owner, 1))
    expired = make_upload(session, owner, 1)
    run_out(session, expired)
    yield "expired", expired


def test_an_upload_that_is_over_takes_nothing(session: Session, storage: Storage, owner: Project) -> None:
    for state, upload in ends(session, storage, owner):
        for action in (
            lambda upload=upload: add_part(session, storage, upload, b"x"),
            lambda upload=upload: uploads.choose(session, upload, []),
            lambda upload=upload: uploads.cancel(session, upload),
        ):
            with pytest.raises(WrongState, match=f"Upload '{upload.id}' is {state}, so it cannot be"):
                action()


def test_time_that_runs_out_while_parts_are_joined_is_forgiven(
    session: Session, storage: Storage, owner: Project
) -> None:
    upload = make_upload(session, owner, 1)
    stored = uploads.join(
        storage, uploads.choose(session, upload, [add_part(session, storage, upload, b"x").id]), md5=None
    )
    run_out(session, upload)

    assert uploads.sweep(session, storage) == 0
    assert uploads.complete(session, upload, stored).bytes == 1


def test_of_two_that_complete_an_upload_the_second_gets_the_firsts_file(
    session: Session, storage: Storage, owner: Project
) -> None:
    upload = make_upload(session, owner, 1)
    parts = uploads.choose(session, upload, [add_part(session, storage, upload, b"x").id])
    first, second = (uploads.join(storage, parts, md5=None) for _ in range(2))

    file = uploads.complete(session, upload, first)

    assert uploads.complete(session, upload, second) is file
    assert uploads.completed(session, upload) is file
    assert file.key == first.key
    files.delete(session, file, in_use_by=None)
    with pytest.raises(NotFound, match=f"No file '{file.id}'"):
        uploads.complete(session, upload, second)


def test_abandoned_uploads_are_swept(session: Session, storage: Storage, owner: Project) -> None:
    left, alive = make_upload(session, owner, 5), make_upload(session, owner, 5)
    gone, kept = (add_part(session, storage, upload, b"12345") for upload in (left, alive))
    run_out(session, left, ago=2 * uploads.LIFETIME)

    assert uploads.sweep(session, storage) == 1
    session.refresh(left)
    assert (left.status, alive.status) == ("expired", "pending")
    assert (storage.stat(gone.key), storage.stat(kept.key)) == (None, 5)
    assert session.scalars(select(UploadPart.id)).all() == [kept.id]


def test_an_upload_is_found_by_its_project_only(session: Session, owner: Project) -> None:
    upload = make_upload(session, owner, 1)

    assert uploads.find(session, owner.id, upload.id, lock=True) is upload
    with pytest.raises(NotFound):
        uploads.find(session, rows.project(session).id, upload.id)


def test_joining_parts_of_which_one_is_lost_leaves_nothing(database: Database, session: Session) -> None:
    storage, owner = open_storage(database.settings), rows.project(session)
    upload = make_upload(session, owner, 2)
    parts = [add_part(session, storage, upload, b"x") for _ in range(2)]
    storage.delete(parts[1].key)

    with pytest.raises(ObjectMissing):
        uploads.join(storage, parts, None)
    assert list(storage.list("files/")) == []
