"""`tunery advise` of a local file, which needs no server, and of an uploaded one."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import rows
import templates
from cloned_databases import Database
from commands import Run
from sqlalchemy import select
from teams import TRAIN

from tunery import ids
from tunery.datasets import reports
from tunery.datasets.model import File, FileReport
from tunery.datasets.report import maker
from tunery.jobs.model import Job
from tunery.keys.model import Project
from tunery.spec import Columns
from tunery.storage import open_storage

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "juniper", "krill", "lagoon"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """144 rows with different questions, and the first of them again."""
    path = tmp_path / "rows.jsonl"
    asked = [f"What does the {one} {two} form ask for?" for one in WORDS for two in reversed(WORDS)]
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[14:-14]}]}
        for text in [*asked, asked[0]]
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in chats))
    return path


def test_a_file_here(tunery: Run, file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}')
    status, out, err = tunery("advise", file, "--aim", "new_facts", "-m", tmp_path)
    assert status == 0, err
    assert out.startswith("Do not fine-tune: use retrieval (RAG).")
    assert "Do not fine-tune to teach facts: it is unreliable." in out
    assert "0.00132" in out
    assert "--set technique.type=lora" in out


def test_a_table_is_read_by_named_columns_here_and_there(
    tunery: Run, api: str, database: Database, tmp_path: Path
) -> None:
    """The next command names them too."""
    path, model = tmp_path / "fragen.csv", templates.model_folder(tmp_path / "base", templates.CHATML)
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
    (model / "config.json").write_text(json.dumps(sizes))
    path.write_text("".join(["Frage,Antwort\n", *(f"Was kommt nach {number}?,{number + 1}\n" for number in range(12))]))
    asked = ("--aim", "style", "--columns", "prompt=Frage,completion=Antwort")
    status, out, err = tunery("advise", path, *asked, "-m", model)
    assert (status, "12 rows are usable" in out) == (0, True), err
    assert "--columns prompt=Frage,completion=Antwort" in out.splitlines()[-1]
    assert json.loads(tunery("advise", path, *asked, "-m", model, "--json")[1])["rows"]["answer_tokens"] > 0

    file_id = tunery("files", "upload", path)[1].strip()
    with database.sessions.begin() as session:
        base = rows.base(session).id
        for columns in (None, Columns(prompt="Frage", completion="Antwort")):
            report = reports.request(session, session.get_one(File, file_id), columns=columns)
            reports.finish(session, report, summary=maker.make(path, columns=report.columns).summary())
    status, out, err = tunery("advise", file_id, *asked, "-m", base)
    assert (status, "12 rows are usable" in out) == (0, True), err


def test_a_file_here_as_json_counts_usable_rows(tunery: Run, file: Path) -> None:
    status, out, err = tunery("advise", file, "--aim", "style", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["rows"]["total"] == 145
    assert found["rows"]["left_out"]["exact_duplicate"] == 1
    assert found["recommendation"] == ("fine_tune" if found["rows"]["usable"] >= 100 else "prompt")


def test_an_uploaded_file(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(TRAIN)
    file_id = tunery("files", "upload", path)[1].strip()
    with database.sessions.begin() as session:
        report = session.scalars(select(FileReport)).one()
        reports.finish(session, report, summary=maker.make(path).summary())
        base = rows.base(session).id
    status, out, err = tunery("advise", file_id, "--aim", "style", "-m", base)
    assert (status, out.startswith("Write a prompt first; do not fine-tune yet.")) == (0, True), err
    assert "1 of 12 rows are usable." in out
    assert re.search(r"Serving it on T4:\nmerged +[\d,]+ to [\d,]+ tokens/s, [\d. to]+ USD per million tokens", out)
    assert f"tunery jobs create -m {base} --train {file_id} " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.jsonl", "--aim", "style"), "nowhere.jsonl"),
        (("file-1", "--aim", "peace"), "output_format"),
        (("file-1", "--aim", "style"), "--model"),
    ],
)
def test_what_is_wrong_is_said(tunery: Run, api: str, arguments: tuple[str, ...], said: str) -> None:
    status, _, err = tunery("advise", *arguments)
    assert status != 0
    assert said in err


def test_a_dry_run_of_a_job_leaves_nothing(tunery: Run, api: str, database: Database, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(TRAIN)
    with database.sessions.begin() as session:
        base = rows.base(session).id
        names = {"project_id": session.scalars(select(Project.id)).one(), "sha256": hashlib.sha256(TRAIN).hexdigest()}
        made = FileReport(id=ids.new(ids.REPORT), version=reports.VERSION, base="", against="", **names)
        session.add(made)
        session.flush()
        reports.finish(session, made, summary=maker.make(path).summary())
        storage = open_storage(database.settings)
        storage.put(f"{made.prefix}/report.json", json.dumps(maker.make(path).as_dict()).encode())
    asked = ("jobs", "create", "-m", base, "--train", path, "--rank", 4, "--dry-run")
    status, out, err = tunery(*asked)
    assert (status, out.startswith("✓ The job is valid. Nothing was stored.")) == (0, True), err
    assert "12, of which 1 are usable" in out
    assert "lora, r 4, alpha 32" in out
    assert "12 examples are few" in err
    with database.sessions.begin() as session:
        assert session.scalars(select(Job)).all() == []
        assert [file.deleted_at is None for file in session.scalars(select(File))] == [False]
