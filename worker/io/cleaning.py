"""Cleans files in a separate process, whose memory is freed with it, and stores the new files."""

import json
from functools import partial
from pathlib import Path

from tunery import db
from tunery.datasets import cleanings, progress
from tunery.datasets import reports as file_reports
from tunery.datasets.cleaning.order import Cleaning
from tunery.datasets.model import File, FileCleaning
from tunery.datasets.report.order import Order
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from worker.io import programs, reports
from worker.io.claims import take_one
from worker.supervisor.drain import Drain

SECONDS = 1800
"""Time limit of a cleaning, the same as a report's: it judges the rows a few times, each later time faster."""


def clean_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """Does one cleaning; returns whether there was one."""
    return take_one("clean", _waiting, lambda file_id: _clean(file_id, settings, storage, drain))


def _waiting() -> list[str]:
    with db.transaction() as session:
        return cleanings.waiting(session)


def _clean(file_id: str, settings: Settings, storage: Storage, drain: Drain) -> None:
    with db.transaction() as session:
        cleaning = cleanings.begin(session, file_id)
    if cleaning is None:
        return

    def fail(error: Exception) -> None:
        _fail(file_id, f"The file could not be cleaned: {type(error).__name__}.")

    with programs.workplace(settings.runs_dir, "cleaning", file_id, fail, partial(_release, file_id)) as folder:
        _lay_out(cleaning, folder, settings, storage)
        reason = programs.run(
            ["tunery.datasets.cleaning", str(folder)], folder, drain, what="cleaning", seconds=SECONDS,
            watch=lambda: _show_progress(file_id, folder),
        )  # fmt: skip
        if drain.begun:
            _release(file_id)
        elif reason is None:
            _publish(cleaning, folder, storage)
        else:
            _fail(file_id, reason)


def _release(file_id: str) -> None:
    with db.transaction() as session:
        cleanings.release(session, file_id)


def _lay_out(cleaning: FileCleaning, folder: Path, settings: Settings, storage: Storage) -> None:
    """Fills the process's folder."""
    order = Cleaning.model_validate(cleaning.order)
    with db.transaction() as session:
        source = session.get_one(File, cleaning.source_id)
        against = session.get_one(File, cleaning.against_id) if cleaning.against_id else None
        base = session.get_one(Model, cleaning.base_id) if cleaning.base_id else None
        others = file_reports.others(session, source.project_id, source.sha256)
        judged = file_reports.judged(session, source, base.id, order.columns) if base else None
    storage.fetch(source.key, folder / "rows", source.sha256)
    if against is not None:
        storage.fetch(against.key, folder / "against", against.sha256)
        others = [(file, report) for file, report in others if file.sha256 != against.sha256]
    if judged is not None:
        (folder / "report.json").write_bytes(b"".join(storage.read(f"{judged.prefix}/report.json")))
    (folder / "cleaning_order.json").write_text(order.model_dump_json())
    asked = Order(compares=against is not None, max_tokens=order.max_tokens)
    reports.lay_out_known(folder, settings, storage, asked, base, others)


def _show_progress(file_id: str, folder: Path) -> None:
    fraction = progress.read(folder)
    if fraction is not None:
        with db.transaction() as session:
            cleanings.show_progress(session, file_id, fraction)


def _publish(cleaning: FileCleaning, folder: Path, storage: Storage) -> None:
    """Stores the new files, then writes their rows. Files that an interrupted attempt stored are replaced."""
    names = {cleaning.file_id: "clean.jsonl"}
    if cleaning.held_out_id is not None:
        names[cleaning.held_out_id] = "held-out.jsonl"
    stored = {}
    for id, name in names.items():
        storage.delete(f"files/{id}")
        stored[id] = storage.put_file(f"files/{id}", folder / name)
    with db.transaction() as session:
        row = session.get_one(FileCleaning, cleaning.file_id)
        purged = cleanings.finish(session, row, json.loads((folder / "cleaning.json").read_text()), stored)
    for key in purged:  # deleted meanwhile, and purged before their bytes were stored
        storage.delete(key)


def _fail(file_id: str, reason: str) -> None:
    with db.transaction() as session:
        cleanings.fail(session, session.get_one(FileCleaning, file_id), reason)
