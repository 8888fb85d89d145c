"""Reports of files: requested here, made by an I/O worker, stored by file content."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, exists, func, select, update
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.datasets.arrival import check_written
from tunery.datasets.errors import NoReport
from tunery.datasets.model import File, FileCleaning, FileEvent, FileReport
from tunery.rows.shapes import can_be_named
from tunery.rows.tables import CSV, TSV
from tunery.spec import Columns, named_columns
from tunery.storage import Storage

VERSION = 8
"""Version of the reports' content. An older report is made again when it is requested."""
_LINES_OF_TABLES = 8
"""Version from which a report names the rows of a table by their lines, no longer by their places."""
QUEUED, RUNNING, READY, FAILED = "queued", "running", "ready", "failed"
MAX_TRIES = 3
"""Workers that may die during one report before it fails, as others wait behind it."""
_LOST = (
    "The worker stopped {tries} times before it had made the report. Look for very large rows, or ask the operator to "
    "read the I/O worker's log."
)


# --- asking -------------------------------------------------------------------------------------------------------


def request(
    session: Session, file: File, *, base: str = "", against: str = "", columns: Columns | None = None
) -> FileReport:
    """Returns the report of a file's content, and queues it if it is new.

    `base`: the id of the model whose tokenizer counts; `against`: the sha256 of the content to compare with; `columns`:
    by which both contents are read.
    """
    key = _key(file, base, columns) | {"against": against}
    made = insert(FileReport).values(id=ids.new(ids.REPORT), version=VERSION, **key)
    session.execute(made.on_conflict_do_nothing())
    report = session.scalars(select(FileReport).filter_by(**key)).one()
    if report.version < VERSION and report.status in (READY, FAILED):
        _reset(report)
    if report.status == QUEUED:
        dispatch.nudge_after_commit(session, dispatch.IO)
    elif report.status in (READY, FAILED) and _is_plain(report):
        _tell_files(session, report)
    session.flush()
    return report


def _key(file: File, base: str, columns: Columns | None) -> dict[str, Any]:
    """Returns the values that identify a report which compares with no other file."""
    content = {"project_id": file.project_id, "sha256": file.sha256, "base": base, "against": ""}
    return content | {"columns": named_columns(columns)}


def _reset(report: FileReport) -> None:
    report.version, report.status, report.progress, report.tries = VERSION, QUEUED, 0.0, 0
    report.summary = report.error = report.finished_at = None


def of_files(session: Session, files: Sequence[File]) -> dict[str, FileReport]:
    """Returns the reports that every training file gets, by the files' ids.

    A report is stored by content, which a file of another purpose may share.
    """
    files = [file for file in files if _has_rows(file)]
    contents = {(file.project_id, file.sha256) for file in files}
    found = session.scalars(
        select(FileReport).where(
            FileReport.project_id.in_({project for project, _ in contents}),
            FileReport.sha256.in_({sha256 for _, sha256 in contents}),
            FileReport.base == "",
            FileReport.against == "",
            FileReport.columns == {},
        )
    )
    by_content = {(report.project_id, report.sha256): report for report in found}
    return {file.id: report for file in files if (report := by_content.get((file.project_id, file.sha256))) is not None}


def find(session: Session, file: File, base: str = "", columns: Columns | None = None) -> FileReport | None:
    """Returns the file's report that compares with no other file, if it was requested."""
    return session.scalars(select(FileReport).filter_by(**_key(file, base, columns))).one_or_none()


def of_base(session: Session, file: File, base: str, columns: Columns | None = None) -> FileReport | None:
    """Returns the file's report by a base that is ready, one that compares with no other file."""
    found = find(session, file, base, columns)
    return found if found is not None and found.status == READY else None


def judged(session: Session, file: File, base: str, columns: Columns | None = None) -> FileReport | None:
    """Returns that report if a cleaning can act on the rows that it names."""
    found = of_base(session, file, base, columns)
    return found if found is not None and has_lines(found) else None


def has_lines(report: FileReport) -> bool:
    """Returns whether a ready report, perhaps of an earlier version, names the rows as today's reports do."""
    is_table = str((report.summary or {}).get("format")).startswith((CSV.name, TSV.name))
    return report.version >= _LINES_OF_TABLES or not is_table


def _has_rows(file: File) -> bool:
    return file.purpose == "fine-tune"


def check_reported(file: File) -> None:
    """Raises NoReport for a file without rows to report on, WrongState for one that is yet to be written."""
    if not _has_rows(file):
        raise NoReport(file=file.id, purpose=file.purpose)
    check_written(file)


# --- making -------------------------------------------------------------------------------------------------------


def waiting(session: Session) -> list[str]:
    """Returns the ids of the reports to make, the oldest first: also those whose worker has ended meanwhile."""
    query = select(FileReport.id).where(FileReport.status.in_((QUEUED, RUNNING)))
    return list(session.scalars(query.order_by(FileReport.created_at)))


def begin(session: Session, report_id: str) -> FileReport | None:
    """Returns the report, now running; None if it is no longer wanted or too many workers have died during it."""
    report = session.get(FileReport, report_id, with_for_update=True)
    if report is None or report.status not in (QUEUED, RUNNING):
        return None
    if report.tries >= MAX_TRIES:
        finish(session, report, error=_LOST.format(tries=report.tries))
        return None
    report.status, report.progress = RUNNING, 0.0
    report.tries += 1
    session.flush()
    return report


def release(session: Session, report_id: str) -> None:
    """Requeues a report that an outage or a shutdown interrupted, without counting a try."""
    running = (FileReport.id == report_id) & (FileReport.status == RUNNING)
    session.execute(update(FileReport).where(running).values(status=QUEUED, tries=FileReport.tries - 1))


def show_progress(session: Session, report_id: str, fraction: float) -> None:
    """Stores the progress of a report, 0 to 1."""
    running = (FileReport.id == report_id) & (FileReport.status == RUNNING)
    session.execute(update(FileReport).where(running).values(progress=fraction))


def finish(
    session: Session, report: FileReport, *, summary: dict[str, Any] | None = None, error: str | None = None
) -> None:
    """Stores a report's summary, or why there is none."""
    report.status = READY if error is None else FAILED
    report.summary, report.error, report.progress = summary, error, 1.0
    report.finished_at = func.clock_timestamp()
    session.flush()
    if _is_plain(report):
        _tell_files(session, report)


def _is_plain(report: FileReport) -> bool:
    return not report.base and not report.against and not report.columns


def _tell_files(session: Session, report: FileReport) -> None:
    """Stores the report's verdict in each file with this content, once, with an event."""
    has_event = exists().where(FileEvent.file_id == File.id)
    content = (File.project_id == report.project_id) & (File.sha256 == report.sha256)
    files = select(File).where(content, File.purpose == "fine-tune", File.deleted_at.is_(None))
    for file in session.scalars(files.where(File.status != "uploaded", ~has_event)).all():
        summary = report.summary or {}
        reason = summary.get("reason")
        if reason is not None and not summary["trainable"] and not can_be_named(reason):
            file.status, file.status_details = "error", summary["reason"]
        outcome = "failed" if file.status == "error" else "processed"
        data = {"status": report.status, **{name: summary.get(name) for name in ("rows", "findings", "trainable")}}
        note(session, file, outcome, data)
    session.flush()


def note(session: Session, file: File, outcome: str, data: dict[str, Any] | None = None) -> None:
    """Writes the event that a file is processed, or cannot be used for training; wakes the webhooks."""
    values = {"id": ids.new(ids.FILE_EVENT), "file_id": file.id, "outcome": outcome, "data": data, "fanned_out": False}
    session.execute(insert(FileEvent).values(values).on_conflict_do_nothing())
    dispatch.nudge_after_commit(session, dispatch.IO)


# --- finding what a report needs ----------------------------------------------------------------------------------


def content(session: Session, project_id: str, sha256: str) -> File | None:
    """Returns a file of the project with these bytes whose bytes are still there."""
    query = select(File).where(File.project_id == project_id, File.sha256 == sha256, File.purged_at.is_(None))
    return session.scalar(query.order_by(File.deleted_at.is_not(None), File.created_at).limit(1))


def others(session: Session, project_id: str, sha256: str, *, most: int = 20) -> list[tuple[File, FileReport]]:
    """Returns the newest other contents of the project that have a report, each with one of its files.

    Without those that it was cleaned into or from, which have the same rows by their lineage.
    """
    same = select(File.id).where(File.project_id == project_id, File.sha256 == sha256)
    into = (FileCleaning.file_id == File.id) | (FileCleaning.held_out_id == File.id)
    is_source = exists().where(
        FileCleaning.source_id == File.id, FileCleaning.file_id.in_(same) | FileCleaning.held_out_id.in_(same)
    )
    is_made = exists().where(FileCleaning.source_id.in_(same), into)
    usable = FileReport.summary["usable"]["rows"].as_integer()
    best = (
        select(File.id.label("file"), FileReport.id.label("report"))
        .ext(distinct_on(File.sha256))
        .join(FileReport, (FileReport.project_id == File.project_id) & (FileReport.sha256 == File.sha256))
        .where(File.project_id == project_id, File.sha256 != sha256, File.deleted_at.is_(None))
        .where(~is_source, ~is_made)
        .where(FileReport.status == READY, FileReport.base == "", FileReport.against == "")
        # Read by its own names, or by columns that it lacks, a content may have no rows.
        .order_by(File.sha256, usable.desc().nulls_last(), FileReport.created_at.desc(), File.created_at.desc())
        .subquery()
    )
    query = select(File, FileReport).join(best, File.id == best.c.file).join(FileReport, FileReport.id == best.c.report)
    return [(file, found) for file, found in session.execute(query.order_by(File.created_at.desc()).limit(most))]


# --- going --------------------------------------------------------------------------------------------------------


def remove(session: Session, storage: Storage, file: File) -> None:
    """Removes the reports about a content, objects first, when its last file goes."""
    same = select(File.id).where(File.project_id == file.project_id, File.sha256 == file.sha256)
    if session.scalar(same.where(File.id != file.id, File.deleted_at.is_(None)).limit(1)) is not None:
        return
    about: ColumnElement[bool] = (FileReport.sha256 == file.sha256) | (FileReport.against == file.sha256)
    for report in session.scalars(select(FileReport).where(FileReport.project_id == file.project_id, about)).all():
        remove_objects(storage, report.prefix)
        session.delete(report)
    session.flush()


def remove_objects(storage: Storage, prefix: str) -> None:
    """Removes what lies below a report's prefix."""
    for key in list(storage.list(f"{prefix}/")):
        storage.delete(key)
