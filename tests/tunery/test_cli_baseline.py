"""`tunery baseline` from the rows to the table, and `tunery advise --baseline`."""

from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from commands import Run
from sqlalchemy import select
from teams import TRAIN

from tunery.baselines import ledger
from tunery.cli import baseline as command
from tunery.cli.client import ApiClient
from tunery.datasets import reports
from tunery.datasets.model import FileReport
from tunery.datasets.report import maker
from tunery.planning.prompting import Figure, PromptScore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TRAIN)
    return path


def finish(database: Database) -> None:
    """Finishes the waiting baseline as a worker does: no answer is right without examples, and all with four."""
    scores = [
        PromptScore(
            shots=shots, nearest=False, rows=12, primary="exact", prompt_tokens=20.0 + 30 * shots, answer_tokens=2.0,
            metrics={"exact": Figure(score=score, low=low, high=1.0)}, p50_seconds=0.25, device="NVIDIA H200",
        ).model_dump(mode="json")
        for shots, score, low in ((0, 0.0, 0.0), (4, 1.0, 0.76))
    ]  # fmt: skip
    with database.sessions.begin() as session:
        [waiting] = ledger.waiting(session)
        made = ledger.begin(session, waiting)
        assert made is not None
        here = {"model": made.model, "place": "here", "tuned": False, "scores": scores}
        ledger.finish(session, waiting, result={"models": [here], "examples": 12, "left_out": 0})


def test_from_the_rows_to_the_advice(
    tunery: Run, api: str, database: Database, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.sessions.begin() as session:
        base = rows.base(session).id
    monkeypatch.setattr(command.time, "sleep", lambda _: finish(database))
    status, out, err = tunery(
        "baseline", file, "-m", base, "--examples", file, "--shots", "0,4", "--target", "exact=0.7"
    )
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["WHAT", "SCORE"]
    assert "USD PER 1,000" in lines[0]
    assert lines[1].startswith("zero-shot   0.0 %")
    assert lines[2].startswith("4 examples  100.0 %  76.0 to 100.0  140")
    assert "The target of 70 % is met by" in out
    baseline_id = next(word for word in f"{out} {err}".split() if word.startswith("ftbaseline-"))
    assert tunery("baseline", baseline_id)[1].splitlines()[:3] == lines[:3]

    with database.sessions.begin() as session:
        report = session.scalars(select(FileReport)).first()
        assert report is not None
        summary = {**maker.make(file).summary(), "usable": {"rows": 2000, "left_out": {}, "answer_bytes": 4000}}
        for one in session.scalars(select(FileReport)).all():
            reports.finish(session, one, summary=summary)
        file_id = ledger.list_page(session, report.project_id, after=None, limit=1)[0][0].eval_file
    asked = ("advise", file_id, "--aim", "style", "-m", base)
    assert tunery(*asked)[1].startswith("Fine-tune.")
    page = file.parent / "page.html"
    status, out, err = tunery(*asked, "--baseline", baseline_id, "--html", page)
    assert status == 0, err
    assert "Write a prompt first; do not fine-tune yet." in out
    assert "Stop here." in page.read_text()
    assert "4 examples" in page.read_text()
    assert "USD per 1,000" in page.read_text()
    assert "median, NVIDIA H200" in page.read_text()


def test_an_endpoint_elsewhere_is_sent_with_its_price_and_key(
    tunery: Run, api: str, database: Database, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    usual = ApiClient.call

    def listen(remote: ApiClient, method: str, path: str, **more: Any) -> Any:
        sent.append(more.get("json"))
        return usual(remote, method, path, **more)

    monkeypatch.setattr(ApiClient, "call", listen)
    monkeypatch.setenv("TUNERY_EXTERNAL_KEY", "sk-elsewhere")
    with database.sessions.begin() as session:
        base = rows.base(session).id
    there = ("--external", "large@https://api.example.com/v1", "--external-price", "0.5,1.5")
    there += ("--columns", "prompt=Frage,completion=Antwort")
    status, _, err = tunery("baseline", file, "-m", base, "--shots", "0", "--max-new-tokens", "7", *there)
    assert (status, "external" in err) == (1, True)  # the operator has not allowed it
    assert sent[-1]["max_new_tokens"] == 7
    assert sent[-1]["columns"] == {"prompt": "Frage", "completion": "Antwort"}
    assert sent[-1]["external"] == {
        "model": "large", "base_url": "https://api.example.com/v1", "api_key": "sk-elsewhere",
        "price_per_million": {"prompt": 0.5, "answer": 1.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rows.jsonl",), "--model"),
        (("nowhere.jsonl", "-m", "x"), "nowhere.jsonl"),
        (("rows.jsonl", "-m", "x", "--shots", "few"), "0,4,8"),
        (("rows.jsonl", "-m", "x", "--target", "exact=all"), "exact=0.9"),
        (("rows.jsonl", "-m", "x", "--external", "large"), "https://HOST/v1"),
        (("rows.jsonl", "-m", "x", "--external", "large@https://h/v1", "--external-price", "3"), "0.5,1.5"),
        (("rows.jsonl", "-m", "x", "--max-new-tokens", "5000"), "max_new_tokens"),
        (("rows.jsonl", "-m", "x", "--columns", "prompt=Frage"), "whole row"),
    ],
)
def test_what_is_wrong_is_said(tunery: Run, api: str, file: Path, arguments: tuple[str, ...], said: str) -> None:
    status, _, err = tunery("baseline", *arguments)
    assert status != 0
    assert said in err
