"""Checks the syntax of files that were uploaded without being read, and lets jobs that wait for them go on."""

from tunery import db
from tunery.datasets import files
from tunery.datasets.model import File
from tunery.storage import Storage
from worker.io.claims import advisory_lock


def process_next(storage: Storage) -> bool:
    """Processes one file; returns whether there was one."""
    skip: list[str] = []
    while True:
        with db.transaction() as session:
            file = files.next_unprocessed(session, skip=skip)
            if file is None:
                return False
            skip.append(file.id)
        with advisory_lock(f"process {file.id}") as mine:
            if mine:
                _process(storage, file.id)
                return True


def _process(storage: Storage, file_id: str) -> None:
    with db.transaction() as session:
        file = session.get_one(File, file_id)
    # The file is read without a lock or a transaction: a job that names it must not wait until all of it is read.
    # The session below takes a connection only when the verdict is written.
    with db.transaction() as session:
        session.add(file)
        if file.status == "uploaded":
            files.process(session, storage, file)
