"""Cleaning a file over HTTP: the new file exists at once, and its lineage says how it was made."""

import pytest
from cloned_databases import Database
from teams import TRAIN, Team

from tunery.datasets import cleanings
from tunery.datasets.model import FileCleaning
from tunery.storage import open_storage


def _upload(team: Team, purpose: str = "fine-tune") -> str:
    answer = team.http.post("/v1/files", data={"purpose": purpose}, files={"file": ("t.jsonl", TRAIN)})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_new_file_is_there_at_once_and_becomes_readable(team: Team, database: Database, base: str) -> None:
    source = _upload(team)
    asked = {"recommended": True, "held_out": {"share": 0.1, "seed": 3}, "base": base}
    made = team.http.post(f"/v1/files/{source}/clean", json=asked).json()
    assert (made["status"], made["filename"], made["bytes"]) == ("uploaded", "t-clean.jsonl", 0)
    lineage = team.http.get(f"/v1/files/{made['id']}/cleaning").json()
    assert (lineage["source"], lineage["held_out_rows"]["seed"], lineage["counts"]) == (source, 3, {})
    assert (lineage["base"], lineage["progress"]) == (base, 0.0)
    assert team.http.get(f"/v1/files/{lineage['held_out']}/cleaning").json() == lineage
    for path in ("content", "report", f"preview?model={base}"):
        answer = team.http.get(f"/v1/files/{made['id']}/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_state"), path
    job = team.http.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": made["id"]})
    assert (job.status_code, job.json()["error"]["param"]) == (400, "training_file")

    outcome = {
        "source_sha256": "0" * 64,
        "actions": [],
        "counts": {"rows": 10},
        "kinds": {"pii": {"dropped": 0, "changed": 1}},
        "dropped": [{"line": 2, "kind": "pii", "why": "x"}],
        "changed": [{"line": 1, "kind": "pii", "before": "x", "after": "y"}],
    }
    stored = {id: open_storage(database.settings).put(f"files/{id}", TRAIN) for id in (made["id"], lineage["held_out"])}
    with database.sessions.begin() as session:
        cleanings.finish(session, session.get_one(FileCleaning, made["id"]), outcome, stored)
    file = team.openai(strict=True).files.retrieve(made["id"])
    assert (file.status, file.bytes) == ("processed", len(TRAIN))
    assert team.http.get(f"/v1/files/{made['id']}/content").content == TRAIN
    said = team.http.get(f"/v1/files/{made['id']}/cleaning").json()
    assert (said["dropped"], said["changed"]) == (outcome["dropped"], outcome["changed"])


def test_the_lineage_names_the_columns(team: Team, database: Database) -> None:
    source, named = _upload(team), {"prompt": "Frage", "completion": "Antwort"}
    made = team.http.post(f"/v1/files/{source}/clean", json={"recommended": True, "columns": named}).json()
    assert team.http.get(f"/v1/files/{made['id']}/cleaning").json()["columns"] == named
    with database.sessions.begin() as session:  # as the release before wrote it
        row = session.get_one(FileCleaning, made["id"])
        row.order = {name: value for name, value in row.order.items() if name != "columns"}
    assert team.http.get(f"/v1/files/{made['id']}/cleaning").json()["columns"] is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "The request changes nothing"),
        ({"actions": [{"kind": "duplicates", "action": "drop"}]}, "exact_duplicate"),
        ({"actions": [{"kind": "pii", "action": "fix"}]}, "Possible actions: redact, drop"),
        ({"actions": [{"kind": "test_leak", "action": "drop"}]}, "against"),
        ({"actions": [{"kind": "implausible_output", "action": "drop"}]}, "Request the file's report"),
        ({"actions": [{"kind": "answer_cut", "action": "drop"}]}, "'base'"),
        ({"recommended": True, "base": "nowhere"}, "nowhere"),
        ({"rows": {"drop": [0]}}, "counted from 1"),
        ({"held_out": {"share": 0.9}}, "0.5"),
        ({"columns": {"prompt": "Frage", "completion": "Antwort"}}, "The request changes nothing"),
        ({"recommended": True, "columns": {"prompt": "Frage"}}, "does not define a whole row"),
        ({"recommended": True, "columns": {"prompt": "a", "completion": "a"}}, "names a column twice"),
        ({"recommended": True, "columns": {"Frage": "prompt"}}, "Frage"),
    ],
)
def test_what_is_not_possible_is_said(team: Team, body: dict[str, object], said: str) -> None:
    answer = team.http.post(f"/v1/files/{_upload(team)}/clean", json=body)
    assert answer.status_code == (404 if "base" in body else 400)
    assert said in answer.json()["error"]["message"]


def test_only_training_files_are_cleaned_and_only_cleaned_ones_have_a_lineage(team: Team) -> None:
    answer = team.http.post(f"/v1/files/{_upload(team, 'user_data')}/clean", json={"recommended": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_report")
    assert team.http.get(f"/v1/files/{_upload(team)}/cleaning").status_code == 404
