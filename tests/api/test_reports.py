"""A file's report over HTTP: its status in the file, as JSON and as a page; the official client accepts it."""

import json
import time
from pathlib import Path

import pytest
from cloned_databases import Database
from sqlalchemy import select
from teams import BASE, TRAIN, Team

from api.schemas import reports as schemas
from tunery.datasets import reports
from tunery.datasets.model import File, FileReport
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


def test_what_has_no_report(team: Team) -> None:
    other = team.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("x", b"x")}).json()
    assert other["report"] is None
    answer = team.http.get(f"/v1/files/{other['id']}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_report")
    file_id = _upload(team)
    for query in ("base=nothing", "against=file-nothing"):
        assert team.http.get(f"/v1/files/{file_id}/report?{query}").status_code == 404
