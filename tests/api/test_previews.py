"""Previews of a file for a base, as JSON and as a page."""

import json
from pathlib import Path

import pytest
import rows
from cloned_databases import Database
from reported import finish
from sqlalchemy import select
from teams import LINE, Team
from templates import CHATML, model_folder

from tunery.artifacts import manifest
from tunery.datasets.model import FileReport
from tunery.storage import open_storage

PAIR = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"


@pytest.fixture
def base(database: Database, tmp_path: Path) -> str:
    """A ready base whose weights are missing from storage: a preview needs none."""
    folder = model_folder(tmp_path / "base", CHATML)
    (folder / "model.safetensors").write_bytes(b"weights")
    published, sha256 = manifest.publish(open_storage(database.settings), "models/previewed", folder)
    (path,) = Path(database.settings.storage_url.removeprefix("file://")).rglob("model.safetensors")
    path.unlink()  # so that reading it would fail
    with database.sessions.begin() as session:
        rows.base(
            session,
            "previewed",
            prefix="models/previewed",
            manifest=published.model_dump(mode="json"),
            manifest_sha256=sha256,
        )
    return "previewed"


def _upload(team: Team, data: str) -> str:
    files = {"file": ("<b>.jsonl", data.encode())}
    answer = team.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    return str(answer.json()["id"])


def test_preview_marks_every_token(team: Team, base: str) -> None:
    file = _upload(team, LINE * 5)
    answer = team.http.get(f"/v1/files/{file}/preview", params={"model": base, "rows": 2})

    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["object"], made["file"], made["model"], made["passed"]) == ("file.preview", file, base, True)
    assert [row["number"] for row in made["rows"]] == [1, 2]
    [sequence] = made["rows"][0]["sequences"]
    trained = [token["text"] for token in sequence["tokens"] if token["state"] == "trained"]
    assert (trained, sequence["trained"]) == (["a", "<|im_end|>"], 2)


def test_advice_and_a_dry_run_count_the_tokens_that_the_base_makes(
    team: Team, base: str, database: Database, tmp_path: Path
) -> None:
    """As in a job: each answer here is one byte, which is one token of the base, and its end token is learned too."""
    lines = "".join(LINE.replace('"a"', f'"{letter}"') for letter in "abcdefghijkl")
    file = _upload(team, lines)
    assert file
    finish(database, tmp_path, lines.encode(), rows=12, left_out={}, answer_bytes=12)
    asked = {"file": file, "model": base, "aim": "style"}
    advice = team.http.post("/v1/fine_tuning/advice", json=asked).json()["advice"]
    assert advice["rows"]["answer_tokens"] == 24
    assert {card["verdict"] for card in advice["cards"]} == {"fits"}

    body = {"model": base, "training_file": file, "technique": {"type": "lora", "r": 64}, "dry_run": True}
    tried = team.http.post("/v1/fine_tuning/jobs", json=body).json()
    assert any("the answers have about 24 tokens" in text for text in tried["warnings"]), tried["warnings"]


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"prompt": "prompt", "completion": "completion"}, '"score": 0.9'),
        ({"prompt": "prompt", "completion": "completion"}, '"label": 1'),
        ({"prompt": "prompt", "completion": "completion"}, '"Prompt": "x"'),
        ({"prompt": "prompt", "completion": "completion"}, '"rejected": "x"'),
        ({"prompt": "Frage", "completion": "Antwort"}, '"label": false'),
    ],
)
def test_a_file_whose_first_row_has_a_key_to_leave_out_is_taken_and_read_by_named_columns(
    columns: dict[str, str], key: str, team: Team, base: str, database: Database, tmp_path: Path
) -> None:
    """As its report says: it used to be refused at the upload, before a job could name its columns."""
    names = tuple(columns.values())
    rows = "".join(f'{{"{names[0]}": "What is after {n}?", "{names[1]}": "{n + 1}", {key}}}\n' for n in range(10, 22))
    file = _upload(team, rows)
    finish(database, tmp_path, rows.encode())
    shown = team.http.get(f"/v1/files/{file}").json()
    assert (shown["report"]["trainable"], shown["status"]) == (False, "processed")
    with database.sessions() as session:
        [report] = session.scalars(select(FileReport)).all()
        assert report.summary is not None
        assert "in the job's 'columns'." in report.summary["reason"]

    job = {"model": base, "training_file": file, "columns": columns, "technique": {"type": "lora", "r": 64}}
    team.http.get(f"/v1/files/{file}/report", params={"columns": ",".join(map("=".join, columns.items()))})
    finish(database, tmp_path, rows.encode(), rows=12, left_out={}, answer_bytes=24)
    tried = team.http.post("/v1/fine_tuning/jobs", json={**job, "dry_run": True}).json()
    assert (tried["validation"]["examples"], tried["validation"]["trainable"]) == (12, True)
    assert team.http.post("/v1/fine_tuning/jobs", json=job).status_code == 200


def test_advice_and_a_dry_run_read_a_table_by_named_columns(
    team: Team, base: str, database: Database, tmp_path: Path
) -> None:
    """Two bytes are learned of each answer, and its end. Without a report by these columns no row is counted."""
    table = "".join(["Frage,Antwort\n", *(f"Was kommt nach {number}?,{number + 1}\n" for number in range(10, 22))])
    file, named = _upload(team, table), {"prompt": "Frage", "completion": "Antwort"}
    finish(database, tmp_path, table.encode())
    job = {"model": base, "training_file": file, "columns": named, "technique": {"type": "lora", "r": 64}}
    tried = team.http.post("/v1/fine_tuning/jobs", json={**job, "dry_run": True}).json()
    assert (tried["status"], tried["validation"]["status"], tried["error"]) == ("validating_files", None, None)
    request = f"`tunery files report {file} --columns prompt=Frage,completion=Antwort`"
    assert any(request in text for text in tried["warnings"]), tried["warnings"]
    preview = team.http.get(tried["preview"]).json()
    assert preview["shape"].startswith("prompt/completion rows: 'Frage' as the user's message")

    asked = {"file": file, "model": base, "aim": "style", "columns": named, "validation_file": _upload(team, table * 2)}
    assert team.http.post("/v1/fine_tuning/advice", json=asked).json()["status"] == "queued"
    del asked["validation_file"]
    assert team.http.post("/v1/fine_tuning/advice", json=asked).json()["status"] == "queued"
    with database.sessions() as session:
        waiting = session.scalars(
            select(FileReport).where(FileReport.status == "queued", FileReport.columns != {})
        ).all()
    assert [(bool(report.against), report.columns) for report in waiting] == [(True, named), (False, named)]
    finish(database, tmp_path, table.encode(), rows=12, left_out={}, answer_bytes=24)
    found = team.http.post("/v1/fine_tuning/advice", json=asked).json()
    assert (found["columns"]["prompt"], found["advice"]["rows"]["answer_tokens"]) == ("Frage", 36)
    page = f"/v1/files/{file}/advice.html?model={base}&aim=style&columns="
    assert "<b>36</b><span>answer tokens" in team.http.get(f"{page}prompt=Frage,completion=Antwort").text
    assert team.http.get(f"{page}prompt=Frage").json()["error"]["param"] == "columns"

    tried = team.http.post("/v1/fine_tuning/jobs", json={**job, "dry_run": True}).json()
    assert (tried["validation"]["examples"], tried["validation"]["trainable"]) == (12, True)
    assert any("the answers have about 36 tokens" in text for text in tried["warnings"]), tried["warnings"]
    assert not any("are not counted" in text for text in tried["warnings"])


def test_preview_follows_its_options(team: Team, base: str) -> None:
    asked = {"model": base, "rows": 1, "max_tokens": 20, "loss_on": "all"}
    made = team.http.get(f"/v1/files/{_upload(team, LINE)}/preview", params=asked).json()

    [sequence] = made["rows"][0]["sequences"]
    assert (sequence["trained"], sequence["masked"]) == (19, 1)
    assert sequence["cut"] > 0
    assert [check["name"] for check in made["checks"] if not check["passed"]] == ["end_of_turn_trained"]


def test_preview_shows_both_answers_of_a_pair(team: Team, base: str) -> None:
    made = team.http.get(f"/v1/files/{_upload(team, PAIR)}/preview", params={"model": base}).json()
    assert (len(made["rows"][0]["sequences"]), made["passed"]) == (2, True)


def test_page_has_a_policy_under_which_nothing_runs(team: Team, base: str) -> None:
    file = _upload(team, LINE)
    answer = team.http.get(f"/v1/files/{file}/preview", params={"model": base, "format": "html"})

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "&lt;b&gt;.jsonl" in answer.text


def test_preview_of_what_is_not_there_is_refused(team: Team, base: str, make_team: object) -> None:
    file = _upload(team, LINE)
    ask = lambda **query: team.http.get(f"/v1/files/{file}/preview", params=query)  # noqa: E731

    assert (ask(model="none").status_code, ask().status_code) == (404, 400)
    assert ask(model=base, rows=21).json()["error"]["param"] == "rows"
    assert make_team("others").http.get(f"/v1/files/{file}/preview", params={"model": base}).status_code == 404  # type: ignore[operator]


def test_file_that_holds_no_rows_is_refused(team: Team, base: str) -> None:
    files = {"file": ("a.bin", b"\x00\x01")}
    file = team.http.post("/v1/files", data={"purpose": "user_data"}, files=files).json()["id"]
    answer = team.http.get(f"/v1/files/{file}/preview", params={"model": base})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file_id")
