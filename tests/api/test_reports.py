"""A file's report over HTTP: its status in the file, as JSON and as a page; the official client accepts it."""

import json
import time
from hashlib import sha256
from pathlib import Path

import pytest
from cloned_databases import Database
from sqlalchemy import select
from teams import BASE, TRAIN, Team

from api.schemas import reports as schemas
from tunery.datasets import reports
from tunery.datasets.model import File, FileEvent, FileReport
from tunery.datasets.report import maker
from tunery.storage import open_storage


def _upload(team: Team, data: bytes = TRAIN, name: str = "t.jsonl") -> str:
    answer = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, data)})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def _finish(database: Database, tmp_path: Path, data: bytes = TRAIN) -> None:
    """Finishes the queued reports as a worker does, in this process."""
    (tmp_path / "rows").write_bytes(data)
    made = maker.make(tmp_path / "rows")
    with database.sessions.begin() as session:
        for row in session.scalars(select(FileReport).where(FileReport.status == "queued")).all():
            storage = open_storage(database.settings)
            storage.put(f"{row.prefix}/report.json", json.dumps(made.as_dict()).encode())
            reports.finish(session, row, summary=made.summary())


def test_a_report_follows_an_upload(team: Team, database: Database, tmp_path: Path) -> None:
    client = team.openai(strict=True)
    file = client.files.create(file=("t.jsonl", TRAIN), purpose="fine-tune")
    assert file.status == "processed"
    assert file.report["status"] == "queued"  # type: ignore[attr-defined]
    waiting = team.http.get(f"/v1/files/{file.id}/report").json()
    assert (waiting["status"], waiting["findings"], waiting["trainable"]) == ("queued", [], None)
    assert 'http-equiv="refresh"' in team.http.get(f"/v1/files/{file.id}/report.html").text

    _finish(database, tmp_path)
    assert client.files.retrieve(file.id).report["findings"] > 0  # type: ignore[attr-defined]
    found = team.http.get(f"/v1/files/{file.id}/report").json()
    assert (found["status"], found["rows"], found["trainable"], found["file"]) == ("ready", 12, True, file.id)
    assert found["counts"]["exact_duplicate"] == 1
    assert set(found) == set(schemas.FileReport.model_validate(found, strict=True).model_dump()), (
        "all fields, none else"
    )
    assert found["findings"][0]["lines"] == list(range(1, 13))
    page = team.http.get(f"/v1/files/{file.id}/report.html")
    assert page.headers["content-type"].startswith("text/html")
    assert "Exact duplicates" in page.text
    assert "<script" not in page.text
    assert client.files.list().data[0].report["status"] == "ready"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_report_that_names_every_row_of_many_opens_at_once(team: Team, database: Database, tmp_path: Path) -> None:
    """A hundred thousand rows, each in a finding. Processor time is measured, as other load does not add to it."""
    file_id = _upload(team)
    _finish(database, tmp_path)
    why = "Questions and answers are nearly the same."
    findings = [
        {"kind": "near_duplicate", "lines": [at, at + 1], "score": 0.9, "why": why, "action": "Keep one of them."}
        for at in range(1, 100_000, 2)
    ]
    storage = open_storage(database.settings)
    with database.sessions() as session:
        prefix = session.scalars(select(FileReport)).one().prefix
    said = json.loads(b"".join(storage.read(f"{prefix}/report.json"))) | {"rows": 100_000, "findings": findings}
    storage.put(f"{prefix}/report.json", json.dumps(said).encode())
    for route, most in (("report", 20_000_000), ("report.html", 500_000)):
        began = time.process_time()
        answer = team.http.get(f"/v1/files/{file_id}/{route}")
        used = time.process_time() - began
        print(route, round(used, 3), "s", len(answer.content), "bytes")
        assert answer.status_code == 200
        assert used < 1
        assert len(answer.content) < most


def test_a_page_shows_rows_as_text(team: Team, database: Database, tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">'
    data = TRAIN + (json.dumps({"messages": [{"role": bad, "content": "x"}]}) + "\n").encode()
    file_id = _upload(team, data, name=f"{bad}.jsonl")
    _finish(database, tmp_path, data)
    page = team.http.get(f"/v1/files/{file_id}/report.html").text
    assert "<img" not in page
    assert "&lt;img" in page


def test_no_job_is_made_of_a_file_that_its_report_refuses(
    team: Team, database: Database, tmp_path: Path, base: str
) -> None:
    data = TRAIN + b'{"messages": [{"role": "wizard", "content": "x"}]}\n'
    file_id = _upload(team, data)
    _finish(database, tmp_path, data)
    file = team.http.get(f"/v1/files/{file_id}").json()
    assert file["status"] == "error"
    assert "wizard" in file["status_details"]
    answer = team.http.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": file_id})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "training_file"
    assert "wizard" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["", f"?base={BASE}", "?against={other}", f"?base={BASE}&against={{other}}"])
def test_each_base_and_comparison_has_a_report_of_its_own(
    query: str, team: Team, database: Database, base: str
) -> None:
    file_id, other = _upload(team), _upload(team, TRAIN * 2)
    for _ in range(2):
        answer = team.http.get(f"/v1/files/{file_id}/report{query.format(other=other)}")
        assert answer.json()["status"] == "queued"
    with database.sessions.begin() as session:
        found = [(row.base, row.against) for row in session.scalars(select(FileReport))]
        asked = (BASE if "base" in query else "", session.get_one(File, other).sha256 if "against" in query else "")
    # The two that the uploads requested, and that of the query.
    assert sorted(found) == sorted([("", ""), ("", "")] + [asked] * bool(query))


TABLE = "".join(["Frage,Antwort\n", *(f"Wie spät ist es in Ort {i}?,Um {i}.\n" for i in range(12))]).encode()
NAMED = {"prompt": "Frage", "completion": "Antwort"}


def test_a_table_with_other_columns_is_reported_by_those_that_are_named(
    team: Team, database: Database, tmp_path: Path, base: str
) -> None:
    file_id, path = _upload(team, TABLE, "fragen.csv"), f"{tmp_path}/rows"
    _finish(database, tmp_path, TABLE)
    plain = team.http.get(f"/v1/files/{file_id}/report").json()
    assert (plain["columns"], plain["trainable"], plain["examples"]) == (None, False, 0)
    assert "'Frage', 'Antwort'" in plain["reason"]
    assert "'columns'" in plain["reason"]

    asked = "columns=prompt=Frage,completion=Antwort"
    assert team.http.get(f"/v1/files/{file_id}/report?{asked}").json()["status"] == "queued"
    # The order of the parts and spaces make no other report.
    other = "columns=completion%3DAntwort, prompt %3D Frage"
    assert team.http.get(f"/v1/files/{file_id}/report?{other}").json()["status"] == "queued"
    with database.sessions.begin() as session:
        (row,) = session.scalars(select(FileReport).where(FileReport.status == "queued"))
        assert (row.columns, row.base, row.against) == (NAMED, "", "")
        made = maker.make(Path(path), columns=row.columns)
        open_storage(database.settings).put(f"{row.prefix}/report.json", json.dumps(made.as_dict()).encode())
        reports.finish(session, row, summary=made.summary())
    found = team.http.get(f"/v1/files/{file_id}/report?{asked}").json()
    assert (found["columns"], found["status"], found["examples"], found["reason"]) == (NAMED, "ready", 12, None)
    assert found["shape"].endswith("'Antwort' as the answer; other columns are not read")
    assert set(found) == set(schemas.FileReport.model_validate(found, strict=True).model_dump())
    page = team.http.get(f"/v1/files/{file_id}/report.html?{asked}").text
    assert "&#39;Antwort&#39; as the answer; other columns are not read" in page

    # The report that every file gets stays, and so does what the file says of it.
    assert team.http.get(f"/v1/files/{file_id}/report").json() == plain
    file = team.http.get(f"/v1/files/{file_id}").json()
    assert (file["status"], file["report"]["trainable"]) == ("processed", False)
    for more in (f"&base={base}", f"&against={_upload(team)}"):
        assert team.http.get(f"/v1/files/{file_id}/report?{asked}{more}").json()["status"] == "queued"


def test_a_report_by_columns_says_nothing_of_the_file(team: Team, database: Database) -> None:
    """The file's verdict and its event are those of the report by its own names, whichever is made first."""
    file_id = _upload(team, TABLE, "fragen.csv")
    team.http.get(f"/v1/files/{file_id}/report?columns=text=Frage")
    with database.sessions.begin() as session:
        row = session.scalars(select(FileReport).where(FileReport.columns != {})).one()
        reports.finish(session, row, summary={"trainable": False, "reason": "No.", "rows": 12, "findings": 0})
    with database.sessions() as session:
        assert session.scalars(select(FileEvent)).all() == []
    file = team.http.get(f"/v1/files/{file_id}").json()
    assert (file["status"], file["report"]["status"]) == ("processed", "queued")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("prompt=Frage", "does not define a whole row"),
        ("prompt=Frage,completion=Frage", "names a column twice"),
        ("Frage", "Write 'columns' as part=column,part=column"),
        ("prompt=Frage, kurz,completion=Antwort", 'If a name has a comma, write a JSON object, such as {"prompt": "'),
        ("question=Frage,completion=Antwort", "Unknown parameter: 'columns.question'"),
        ("text=Frage,text=Antwort", "'columns' has 'text' twice"),
        ("", "Write 'columns' as part=column,part=column"),
    ],
)
def test_columns_that_name_no_rows_are_refused_in_the_same_words(
    team: Team, database: Database, base: str, columns: str, said: str
) -> None:
    file_id = _upload(team, TABLE, "fragen.csv")
    routes = (("report", {}), ("report.html", {}), ("preview", {"model": base}))
    answers = [team.http.get(f"/v1/files/{file_id}/{at}", params={"columns": columns, **more}) for at, more in routes]
    errors = [answer.json()["error"] for answer in answers]
    assert [answer.status_code for answer in answers] == [400] * len(routes)
    assert errors[0]["param"] in ("columns", "columns.question")
    assert said in errors[0]["message"]
    assert errors == errors[:1] * len(routes)
    with database.sessions() as session:
        assert len(session.scalars(select(FileReport)).all()) == 1, "nothing was queued"


def test_names_of_columns_may_be_long(team: Team) -> None:
    """An entry of the index that finds a report holds 2,704 bytes at most."""
    digits = [sha256(str(i).encode()).hexdigest() for i in range(40)]
    parts = ("messages", "prompt", "completion", "system", "context", "history", "tools", "text", "chosen", "rejected")
    named = {part: "".join(digits[4 * at : 4 * at + 4])[:200] for at, part in enumerate(parts)}
    columns = ",".join(f"{part}={name}" for part, name in named.items())
    file_id = _upload(team, TABLE, "fragen.csv")
    for _ in range(2):
        answer = team.http.get(f"/v1/files/{file_id}/report", params={"columns": columns})
        assert (answer.status_code, answer.json()["columns"]) == (200, named)


def test_what_has_no_report(team: Team) -> None:
    other = team.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x")}).json()
    assert other["report"] is None
    answer = team.http.get(f"/v1/files/{other['id']}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_report")
    file_id = _upload(team)
    same = team.http.post("/v1/files", data={"purpose": "vision"}, files={"file": ("x", TRAIN)}).json()
    assert same["report"] is None, "that of a training file with the same content is not this file's"
    for query in ("base=nothing", "against=file-nothing"):
        assert team.http.get(f"/v1/files/{file_id}/report?{query}").status_code == 404
