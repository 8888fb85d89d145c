"""Files are cleaned by a process of their own, whose memory goes with it, and the new files are stored."""

import json
from pathlib import Path

from tunery import db
from tunery.datasets import cleanings
from tunery.datasets.model import File, FileCleaning
from tunery.settings import Settings
from tunery.storage import Storage
from worker.io import programs
from worker.io.claims import take_one
from worker.supervisor.drain import Drain


def clean_next(settings: Settings, storage: Storage, drain: Drain) -> bool:
    """One cleaning; whether there was one."""
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

    with programs.workplace(settings.runs_dir, "cleaning", file_id, fail) as folder:
        _lay_out(cleaning, folder, storage)
        reason = programs.run(["tunery.datasets.cleaning", str(folder)], folder, drain, what="cleaning")
        if drain.begun:
            return  # the next worker begins again
        if reason is None:
            _publish(cleaning, folder, storage)
        else:
            _fail(file_id, reason)


def _lay_out(cleaning: FileCleaning, folder: Path, storage: Storage) -> None:
    """Fills the folder of the process."""
    with db.transaction() as session:
        source = session.get_one(File, cleaning.source_id)
        against = session.get_one(File, cleaning.against_id) if cleaning.against_id else None
    storage.fetch(source.key, folder / "rows", source.sha256)
    if against is not None:
        storage.fetch(against.key, folder / "against", against.sha256)
    (folder / "order.json").write_text(json.dumps(cleaning.order))


def _publish(cleaning: FileCleaning, folder: Path, storage: Storage) -> None:
    """Stores the new files, then the rows say so. What a predecessor stored is written over."""
    names = {cleaning.file_id: "clean.jsonl"}
    if cleaning.held_out_id is not None:
        names[cleaning.held_out_id] = "held-out.jsonl"
    stored = {}
    for id, name in names.items():
        storage.delete(f"files/{id}")
        stored[id] = storage.put_file(f"files/{id}", folder / name)
    with db.transaction() as session:
        row = session.get_one(FileCleaning, cleaning.file_id)
        cleanings.finish(session, row, json.loads((folder / "cleaning.json").read_text()), stored)


def _fail(file_id: str, reason: str) -> None:
    with db.transaction() as session:
        cleanings.fail(session, session.get_one(FileCleaning, file_id), reason)
