"""Baselines over HTTP: creating, refusing, listing and cancelling them; their table and the target."""

import json
from pathlib import Path
from typing import Any

import pytest
import rows
from cloned_databases import Database
from pydantic import SecretStr
from reported import finish, upload
from teams import BASE, Team

from tunery.baselines import duration, ledger
from tunery.baselines.external import unseal
from tunery.baselines.model import Baseline
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.planning import cards
from tunery.planning.prompting import Figure, PromptScore

ROUTE = "/v1/fine_tuning/baselines"


def ask(team: Team, **more: Any) -> Any:
    return team.http.post(ROUTE, json={"model": BASE, "eval_file": upload(team), **more})


def test_it_is_queued_listed_and_cancelled(team: Team, base: str, database: Database) -> None:
    first, second = ask(team).json(), ask(team, shots=[0], seed=3).json()
    assert (first["status"], first["shots"], first["table"], first["cheapest"]) == ("queued", "auto", [], None)
    listed = team.http.get(f"{ROUTE}?limit=1").json()
    assert ([one["id"] for one in listed["data"]], listed["has_more"]) == ([second["id"]], True)
    ended = team.http.post(f"{ROUTE}/{first['id']}/cancel").json()
    assert (ended["status"], ended["finished_at"] is None) == ("cancelled", False)
    assert team.http.post(f"{ROUTE}/{first['id']}/cancel").json()["error"]["code"] == "wrong_state"
    with database.sessions.begin() as session:
        assert ledger.waiting(session) == [second["id"]]
        assert not ledger.finish(session, first["id"], result={})
    answers = team.http.get(f"{ROUTE}/{second['id']}/answers")
    assert (answers.status_code, answers.json()["error"]["code"]) == (400, "wrong_state")


def test_large_models_are_warned_of_where_a_cpu_answers(
    team: Team, base: str, make_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "_WARNED", 0)
    (warning,) = ask(team).json()["warnings"]
    assert "runs on the CPU of the I/O worker" in warning
    assert ask(team.on(make_app(io_gpu=0))).json()["warnings"] == []


WRONG: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "nothing"}, 404, "model"),
    ({"eval_file": "file-nothing"}, 404, "eval_file"),
    ({"examples_file": "file-nothing"}, 404, "examples_file"),
    ({"compare": ["nothing"]}, 404, "compare"),
    ({"shots": [0, 4]}, 400, "examples_file"),
    ({"retrieval": "nearest"}, 400, "examples_file"),
    ({"shots": [33]}, 400, "shots"),
    ({"shots": []}, 400, "shots"),
    ({"shots": [True]}, 400, "shots"),
    ({"target": {"metric": "beauty", "at_least": 0.9}}, 400, "target.metric"),
    ({"target": {"at_least": 90}}, 400, "target.at_least"),
    ({"columns": {"prompt": "Frage"}}, 400, "columns"),
    ({"colour": "red"}, 400, "colour"),
]


@pytest.mark.parametrize(("changes", "status", "param"), WRONG)
def test_what_is_wrong_is_named(team: Team, base: str, changes: dict[str, Any], status: int, param: str | None) -> None:
    answer = ask(team, **changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.json()


def test_a_project_has_few_at_a_time_and_keeps_their_files(team: Team, base: str) -> None:
    made = [ask(team).json() for _ in range(ledger.MOST_LIVE)]
    answer = ask(team)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    file_id = made[0]["eval_file"]
    refused = team.http.delete(f"/v1/files/{file_id}").json()["error"]
    assert (refused["code"], made[0]["id"] in refused["message"]) == ("file_in_use", True)
    for one in made:
        team.http.post(f"{ROUTE}/{one['id']}/cancel")
    assert ask(team).status_code == 200
    assert team.http.delete(f"/v1/files/{file_id}").status_code == 200


def test_a_worker_that_is_lost_three_times_fails_it(team: Team, base: str, database: Database) -> None:
    made = ask(team).json()
    for _ in range(ledger.MAX_TRIES):
        with database.sessions.begin() as session:
            assert ledger.begin(session, made["id"]) is not None
    with database.sessions.begin() as session:
        assert ledger.begin(session, made["id"]) is None
    found = team.http.get(f"{ROUTE}/{made['id']}").json()
    assert (found["status"], "3 times" in found["error"]) == ("failed", True)


def measured(
    database: Database, baseline_id: str, scores: dict[int, tuple[float, float]], device: str | None = None
) -> None:
    """Stores a worker's results: by number of shots, the share of exact answers and its interval's lower end."""
    found = [
        PromptScore(
            shots=shots,
            nearest=False,
            rows=12,
            device=device,
            primary="exact",
            metrics={"exact": Figure(score=score, low=low, high=1.0)},
            prompt_tokens=20.0 * (shots + 1),
            answer_tokens=3.0,
            p50_seconds=0.5,
        ).model_dump(mode="json")
        for shots, (score, low) in scores.items()
    ]
    here = {"model": BASE, "place": "here", "tuned": False, "scores": found}
    with database.sessions.begin() as session:
        assert ledger.begin(session, baseline_id) is not None
        assert ledger.finish(session, baseline_id, result={"models": [here], "examples": 12, "left_out": 1})


REACHED: list[tuple[float, dict[int, tuple[float, float]], list[str], int | None]] = [
    (0.9, {0: (0.5, 0.4), 4: (0.97, 0.92), 8: (0.98, 0.93)}, ["missed", "met", "met"], 4),
    (0.9, {0: (0.5, 0.4), 4: (0.92, 0.85), 8: (0.98, 0.93)}, ["missed", "unsure", "met"], 8),
    (0.9, {0: (0.5, 0.4), 4: (0.92, 0.85)}, ["missed", "unsure"], 4),
    (0.9, {0: (0.5, 0.4)}, ["missed"], None),
]


@pytest.mark.parametrize(("at_least", "scores", "verdicts", "shots"), REACHED)
def test_the_cheapest_row_whose_interval_reaches_the_target_is_named(
    team: Team,
    base: str,
    database: Database,
    at_least: float,
    scores: dict[int, tuple[float, float]],
    verdicts: list[str],
    shots: int | None,
) -> None:
    made = ask(team, examples_file=upload(team), target={"metric": "exact", "at_least": at_least}).json()
    measured(database, made["id"], scores)
    found = team.http.get(f"{ROUTE}/{made['id']}").json()
    assert [row["verdict"] for row in found["table"]] == verdicts
    assert (found["cheapest"] and found["cheapest"]["shots"]) == shots
    assert (found["examples"], found["left_out"]) == (12, 1)


def test_a_tune_on_the_same_rows_joins_the_table(team: Team, base: str, database: Database) -> None:
    made = ask(team, target={"at_least": 0.9}).json()
    measured(database, made["id"], {0: (0.25, 0.09)})
    card = {"rows": 12, "primary": "exact", "metrics": {"exact": {"base": 0.25, "tuned": 1.0}}}
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        ready = {"base_model": base, "test_file": made["eval_file"]}
        job = rows.job(session, owner, State.SUCCEEDED, **ready, scorecard=card)
        rows.job(session, owner, State.SUCCEEDED, **ready, scorecard={**card, "rows": 11})
        rows.job(session, owner, State.SUCCEEDED, base_model=base, scorecard=card)
        rows.job(session, rows.project(session), State.SUCCEEDED, **ready, scorecard=card)
        tuned, job_id = job.tuned_model, job.id
    [_, row] = team.http.get(f"{ROUTE}/{made['id']}").json()["table"]
    assert (row["way"], row["model"], row["job"], row["score"]) == ("tuned", tuned, job_id, 1.0)
    assert (round(row["low"], 3), row["prompt_tokens"], row["p50_seconds"]) == (0.758, 20.0, None)
    assert row["verdict"] == "unsure"  # with 12 of 12 rows right, the interval still begins below 90 %
    assert (row["cost_per_1000"], row["device"]) == (None, None)  # a job of an earlier release


def test_a_tunes_time_and_cost_are_those_that_its_job_measured(team: Team, base: str, database: Database) -> None:
    made = ask(team).json()
    measured(database, made["id"], {0: (0.25, 0.09)})
    timed = {"device": "NVIDIA H200", "p50_seconds": 0.2, "prompt_tokens": 21.0, "answer_tokens": 4.0}
    with database.sessions.begin() as session:
        job = rows.job(
            session, session.get_one(Project, team.id), State.SUCCEEDED, base_model=base, test_file=made["eval_file"],
            scorecard={"rows": 12, "primary": "exact", "metrics": {"exact": {"base": 0.25, "tuned": 1.0}}},
        )  # fmt: skip
        job.progress = {"step": 9, "latency": timed}
    [_, row] = team.http.get(f"{ROUTE}/{made['id']}").json()["table"]
    assert {name: row[name] for name in timed} == timed
    assert row["cost_per_1000"] == pytest.approx(cards.find("NVIDIA H200").price * 200 / 3600)  # type: ignore[union-attr]


def test_a_cost_is_that_of_the_device_that_answered(team: Team, base: str, database: Database) -> None:
    made = ask(team, shots=[0]).json()
    measured(database, made["id"], {0: (0.5, 0.2)}, device="NVIDIA H200")
    [row] = team.http.get(f"{ROUTE}/{made['id']}").json()["table"]
    assert row["cost_per_1000"] == pytest.approx(cards.find("NVIDIA H200").price * 500 / 3600)  # type: ignore[union-attr]


def test_advice_ends_in_the_numbers(team: Team, base: str, database: Database, tmp_path: Path) -> None:
    made = ask(team, examples_file=upload(team), target={"at_least": 0.9}).json()
    body = {"file": made["eval_file"], "model": base, "aim": "style", "baseline": made["id"]}
    refused = team.http.post("/v1/fine_tuning/advice", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "baseline")
    measured(database, made["id"], {0: (0.5, 0.4), 4: (0.97, 0.92)})
    finish(database, tmp_path, rows=2000, left_out={}, answer_bytes=4000)
    found = team.http.post("/v1/fine_tuning/advice", json=body).json()
    assert found["advice"]["recommendation"] == "prompt"
    assert [one["rule"] for one in found["advice"]["reasons"]][:3] == ["measured", "target_met", "behaviour_is_learned"]
    assert (
        "4 examples in the prompt, the cheapest that does: 97.0 % (92.0 to 100.0)"
        in found["advice"]["reasons"][1]["text"]
    )
    assert [row["shots"] for row in found["table"]] == [0, 4]
    page = team.http.get(f"/v1/files/{body['file']}/advice.html", params={k: v for k, v in body.items() if k != "file"})
    assert "97.0 %" in page.text
    assert "<h2>Serving it on T4</h2>" in page.text
    assert "<li>Merged: " in page.text
    assert (
        team.http.post("/v1/fine_tuning/advice", json={**body, "baseline": None}).json()["advice"]["recommendation"]
        == "fine_tune"
    )


def test_an_external_endpoint_is_refused_unless_the_operator_allows_it(team: Team, base: str, make_app: Any) -> None:
    external = {"base_url": "https://127.0.0.1/v1", "model": "large", "api_key": "sk-very-secret"}
    refused = ask(team, external=external).json()["error"]
    assert (refused["code"], refused["param"]) == ("unsupported", "external")
    on = team.on(make_app(external_secret=SecretStr("sixteen characters and more")))
    refused = ask(on, external=external).json()["error"]
    assert (refused["code"], refused["param"]) == ("endpoint_refused", "external.base_url")


def test_the_key_is_neither_shown_nor_kept_in_clear(team: Team, base: str, make_app: Any, database: Database) -> None:
    secret = SecretStr("sixteen characters and more")
    on = team.on(make_app(external_secret=secret))
    external = {"base_url": "https://1.1.1.1/v1", "model": "large", "api_key": "sk-very-secret"}
    made = ask(on, external=external)
    assert made.json()["external"] == {"base_url": "https://1.1.1.1/v1", "model": "large", "price_per_million": None}
    with database.sessions.begin() as session:
        row = session.get_one(Baseline, made.json()["id"])
        assert "very-secret" not in json.dumps([row.order, row.external_key])
        assert unseal(row.external_key or "", secret).get_secret_value() == "sk-very-secret"
    on.http.post(f"{ROUTE}/{row.id}/cancel")
    with database.sessions.begin() as session:
        assert session.get_one(Baseline, row.id).external_key is None
