"""`tunery files report` of an uploaded file: it waits, prints what the service has, and writes the page."""

import json
import threading
from pathlib import Path

from commands import Run
from databases import Database
from sqlalchemy import select
from teams import TRAIN

from tunery.datasets import reports
from tunery.datasets.model import FileReport
from tunery.datasets.report import maker
from tunery.storage import open_storage


def _finish(database: Database, path: Path) -> None:
    made = maker.make(path)
    with database.sessions.begin() as session:
        row = session.scalars(select(FileReport)).one()
        open_storage(database.settings).put(f"{row.prefix}/report.json", json.dumps(made.as_dict()).encode())
        reports.finish(session, row, summary=made.summary())


def test_an_uploaded_file_s_report(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(TRAIN)
    file_id = tunery("files", "upload", path)[1].strip()
    worker = threading.Timer(1, _finish, (database, path))
    worker.start()
    page = tmp_path / "page.html"
    status, out, err = tunery("files", "report", file_id, "--html", page)
    worker.join()
    assert (status, f"{file_id} has 12 rows: 12 named" in out) == (0, True), err
    assert "Exact duplicates" in page.read_text()
    status, out, _ = tunery("files", "report", file_id, "--json")
    assert (status, json.loads(out)["counts"]["exact_duplicate"]) == (0, 1)


def test_a_name_that_is_neither_file_nor_id(tunery: Run) -> None:
    status, _, err = tunery("files", "report", "nowhere.jsonl")
    assert status != 0
    assert "nowhere.jsonl" in err
