"""`tunery files clean` of an uploaded file: it waits, prints what the service did, and fetches the new files."""

import json
import threading
from pathlib import Path

from cloned_databases import Database
from commands import Run
from sqlalchemy import select
from teams import TRAIN

from tunery.datasets import cleanings
from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning
from tunery.datasets.model import FileCleaning
from tunery.storage import open_storage


def _work(database: Database, path: Path, reason: str | None = None) -> None:
    with database.sessions.begin() as session:
        row = session.scalars(select(FileCleaning).order_by(FileCleaning.created_at.desc())).first()
        assert row is not None
        if reason is not None:
            return cleanings.fail(session, row, reason)
        storage = open_storage(database.settings)
        parts = {row.file_id: path.with_suffix(".clean")}
        if row.held_out_id is not None:
            parts[row.held_out_id] = path.with_suffix(".apart")
        order = Cleaning.model_validate(row.order)
        done = cleaner.clean(path, *list(parts.values())[:1], order, held_out=parts.get(row.held_out_id or ""))
        stored = {id: storage.put(f"files/{id}", part.read_bytes()) for id, part in parts.items()}
        cleanings.finish(session, row, done.as_dict(), stored)
    return None


def test_an_uploaded_file_is_cleaned_there(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in TRAIN.splitlines()]
    for number, row in enumerate(rows[1:], 1):
        row["messages"][0]["content"] = f"What number has the house called {'xyzuvw'[number % 6] * number}?"
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, rows[1]]))
    file_id = tunery("files", "upload", path)[1].strip()
    (worker := threading.Timer(1, _work, (database, path))).start()
    out = tmp_path / "out.jsonl"
    ran = tunery("files", "clean", file_id, "--keep-one", "exact_duplicate", "--held-out", "0.2", "-o", out, "--json")
    worker.join()
    assert ran[0] == 0, ran[2]
    said = json.loads(ran[1])
    assert (said["source"], said["counts"]["dropped"], said["progress"]) == (file_id, 1, 1.0)
    assert out.read_bytes() == path.with_suffix(".clean").read_bytes()
    apart = tmp_path / "out-held-out.jsonl"
    assert len(apart.read_text().splitlines()) == said["counts"]["held_out"] > 0

    (worker := threading.Timer(1, _work, (database, path, "No row is left."))).start()
    status, _, err = tunery("files", "clean", file_id, "--recommended")
    worker.join()
    assert (status != 0, "No row is left." in err) == (True, True), err


def test_a_cleaning_that_fails_leaves_no_file(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    path, out = tmp_path / "train.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(TRAIN)
    file_id = tunery("files", "upload", path)[1].strip()
    reason = "none begins on line 99"
    (worker := threading.Timer(1, _work, (database, path, reason))).start()
    status, _, err = tunery("files", "clean", file_id, "--drop-line", 99, "--held-out", 0.2, "-o", out)
    worker.join()
    assert (status, reason in err) == (1, True), err
    assert not out.exists()
    assert [file["id"] for file in json.loads(tunery("files", "list", "--json")[1])] == [file_id]


def test_a_table_of_other_columns_is_cleaned_alike_here_and_there(
    tunery: Run, api: str, database: Database, tmp_path: Path
) -> None:
    path, out = tmp_path / "fragen.csv", tmp_path / "out.jsonl"
    path.write_text("Frage,Antwort\nWo ist die Bank?,Links.\nwo ist die bank,Links.\nWer kommt heute mit?,Ich.\n")
    chosen = ("--recommended", "--columns", "prompt=Frage,completion=Antwort", "-o", out)
    status, _, err = tunery("files", "clean", path, *chosen)
    here = out.read_bytes()
    assert status == 0, err
    assert [json.loads(line) for line in here.splitlines()] == [
        {"Frage": "Wo ist die Bank?", "Antwort": "Links."},
        {"Frage": "Wer kommt heute mit?", "Antwort": "Ich."},
    ]
    file_id = tunery("files", "upload", path)[1].strip()
    (worker := threading.Timer(1, _work, (database, path))).start()
    status, said, err = tunery("files", "clean", file_id, *chosen, "--json")
    worker.join()
    assert (status, json.loads(said)["columns"]) == (0, {"prompt": "Frage", "completion": "Antwort"}), err
    assert out.read_bytes() == here


def test_what_the_command_cannot_do_is_said(tunery: Run, api: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(TRAIN)
    (tmp_path / "o").write_text("what was there before")
    for arguments, said in (
        ((path, "-o", tmp_path / "o"), "--recommended"),
        ((path, "--recommended", "-o", tmp_path / "no/o"), "the folder"),
        ((path, "--recommended", "-o", tmp_path), "is a folder"),
        ((path, "--drop-line", 99, "-o", tmp_path / "o"), "none begins on line 99"),
        ((path, "--recommended", "-o", tmp_path / "o", "--against", path), "the same content"),
        (("nowhere.jsonl", "--recommended"), "nowhere.jsonl"),
        ((path, "--recommended"), "--output"),
        ((path, "--columns", "prompt=a,completion=b", "-o", tmp_path / "o"), "--recommended"),
        ((path, "--recommended", "--columns", "prompt=a", "-o", tmp_path / "o"), "whole row"),
        ((path, "--recommended", "--columns", "prompt=a,completion=b", "-o", tmp_path / "o"), "none of the columns"),
        ((path, "--recommended", "-o", tmp_path / "o", "--against", "file-1"), "file-1"),
        ((path, "--drop", "repeated_elsewhere", "-o", tmp_path / "o"), "Upload"),
        ((path, "--drop", "answer_cut", "-o", tmp_path / "o"), "base"),
    ):
        status, _, err = tunery("files", "clean", *arguments)
        assert status != 0, arguments
        assert said in err
    assert (tmp_path / "o").read_text() == "what was there before"
    assert not list(tmp_path.glob(".cleaning-*"))
