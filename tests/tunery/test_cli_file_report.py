"""`tunery files report` of an uploaded file: it waits, prints what the service has, and writes the page."""

import json
import threading
from pathlib import Path

from cloned_databases import Database
from commands import Run
from sqlalchemy import select
from teams import TRAIN

from tunery.datasets import reports
from tunery.datasets.model import FileReport
from tunery.datasets.report import maker
from tunery.storage import open_storage


def _finish(database: Database, path: Path, against: Path | None = None) -> None:
    made = maker.make(path, against)
    with database.sessions.begin() as session:
        row = session.scalars(select(FileReport).where((FileReport.against != "") == (against is not None))).one()
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
    assert (status, f"{file_id} has 12 rows: " in out, "1 finding in 12 of them." in out) == (0, True, True), err
    assert "Exact duplicates" in page.read_text()
    status, out, _ = tunery("files", "report", file_id, "--json")
    assert (status, json.loads(out)["counts"]["exact_duplicate"]) == (0, 1)


def test_a_name_that_is_neither_file_nor_id(tunery: Run) -> None:
    status, _, err = tunery("files", "report", "nowhere.jsonl")
    assert status != 0
    assert "nowhere.jsonl" in err


def test_columns_of_a_local_table_are_named(tunery: Run, tmp_path: Path) -> None:
    table, other = tmp_path / "fragen.csv", tmp_path / "valid.csv"
    table.write_text(
        "Frage,Antwort,label\nWo ist die Bank?,Links.,0\nwo ist die bank,Links.,1\nWer kommt heute mit?,,1\n"
    )
    other.write_text("Frage,Antwort\nWer kommt heute mit?,Ich.\n")
    named = ("--columns", "prompt=Frage,completion=Antwort")
    status, out, err = tunery("files", "report", table, *named, "--json")
    assert (status, (json.loads(out)["shape"] or "")[:38]) == (0, "prompt/completion rows: 'Frage' as the"), err
    assert [(one["kind"], one["lines"]) for one in json.loads(out)["findings"]] == [
        ("empty_output", [4]),
        ("near_duplicate", [2, 3]),
    ]
    status, out, err = tunery("files", "report", other, "--against", other, *named, "--json")
    found = json.loads(out)
    assert (status, [one["kind"] for one in found["findings"]]) == (0, ["test_leak"]), err
    assert found["shape"].startswith("prompt/completion rows: 'Frage' as the user's message")


def test_columns_of_an_uploaded_table_are_named(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    table = tmp_path / "fragen.csv"
    table.write_text("Frage,Antwort\nWo ist die Bank?,Links.\nwo ist die bank,Links.\n")
    named = ("--columns", "prompt=Frage,completion=Antwort")
    file_id = tunery("files", "upload", table)[1].strip()
    worker = threading.Timer(1, _finish_by_columns, (database, table))
    worker.start()
    status, out, err = tunery("files", "report", file_id, *named, "--json")
    worker.join()
    found, here = json.loads(out), json.loads(tunery("files", "report", table, *named, "--json")[1])
    assert (status, found["columns"]) == (0, {"prompt": "Frage", "completion": "Antwort"}), err
    assert {name: found[name] for name in here} == here
    assert [(one["kind"], one["lines"]) for one in found["findings"]] == [("near_duplicate", [2, 3])]
    status, _, err = tunery("files", "report", file_id, "--columns", "prompt=Frage")
    assert (status, "does not define a whole row" in " ".join(err.replace("│", " ").split())) == (2, True)


def _finish_by_columns(database: Database, path: Path) -> None:
    with database.sessions.begin() as session:
        row = session.scalars(select(FileReport).where(FileReport.columns != {})).one()
        made = maker.make(path, columns=row.columns)
        open_storage(database.settings).put(f"{row.prefix}/report.json", json.dumps(made.as_dict()).encode())
        reports.finish(session, row, summary=made.summary())


def test_a_file_is_compared_with_another_by_paths_and_by_ids(
    tunery: Run, api: str, database: Database, tmp_path: Path
) -> None:
    paths = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    lines = TRAIN.splitlines(keepends=True)
    paths[0].write_bytes(b"".join(lines))
    paths[1].write_bytes(b"".join(lines[4:6]))
    status, out, err = tunery("files", "report", paths[0], "--against", paths[1], "--json")
    by_paths = json.loads(out)
    leaks = [(one["lines"], one["score"]) for one in by_paths["findings"] if one["kind"] == "test_leak"]
    assert (status, sorted(line for lines, _ in leaks for line in lines)) == (0, [*range(1, len(lines) + 1)]), err

    ids = [tunery("files", "upload", path)[1].strip() for path in paths]
    worker = threading.Timer(1, _finish, (database, *paths))
    worker.start()
    status, out, err = tunery("files", "report", ids[0], "--against", ids[1], "--json")
    worker.join()
    assert (status, json.loads(out)["findings"]) == (0, by_paths["findings"]), err

    status, _, err = tunery("files", "report", ids[0], "--against", paths[1])
    assert (status, "upload this one too" in " ".join(err.replace("│", " ").split())) == (2, True)


def test_a_file_to_compare_with_that_cannot_be_read(tunery: Run, tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_bytes(TRAIN)
    other.write_text('{"frage": "Wo?"}\n{"frage": "Wann?"}\n')
    status, _, err = tunery("files", "report", train, "--against", other)
    assert status == 1
    assert "No row of the file to compare with can be read. Line 1: " in err
    assert "the key 'messages' is missing" in err
    other.write_bytes(TRAIN.splitlines(keepends=True)[0] + b'{"frage": "Wo?"}\n')
    status, out, err = tunery("files", "report", train, "--against", other, "--html", tmp_path / "page.html")
    said = "Of the 2 rows of the other file, 1 can be read and were compared."
    assert (status, said in out, said in (tmp_path / "page.html").read_text()) == (0, True, True), err
    other.write_text('{"messages": [{"role": "assistant", "content": "Hello."}]}\n')
    _, _, err = tunery("files", "report", train, "--against", other)
    assert "Line 1: It has no prompt." in err


def test_rows_without_an_answer_are_compared(tunery: Run, tmp_path: Path) -> None:
    train, other = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_bytes(TRAIN)
    asked = json.loads(TRAIN.splitlines()[0])["messages"][:-1]
    other.write_text(json.dumps({"messages": asked}) + "\n")
    status, out, err = tunery("files", "report", train, "--against", other, "--json")
    assert (status, json.loads(out)["figures"]["against"]) == (0, {"rows": 1, "compared": 1}), err
    assert json.loads(out)["counts"]["test_leak"]
