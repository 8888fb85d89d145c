"""Jobs that run earlier ones again: what they take over, what a request can change, and what prevents a rerun."""

from typing import Any

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func
from teams import ALIAS, BASE, TRAIN, Team

from tunery.datasets.model import File
from tunery.jobs import ledger
from tunery.jobs.model import Job
from tunery.models import registry
from tunery.models.model import Model
from tunery.spec import Lora, Qlora

ROUTE = "/v1/fine_tuning/jobs"
DECIDED: dict[str, Any] = {
    "technique": Qlora(r=8),
    "n_epochs": 7,
    "batch_size": 3,
    "learning_rate": 0.0123,
    "learning_rate_multiplier": 2.0,
    "max_seq_length": 512,
}


@pytest.fixture
def training(team: Team) -> str:
    sent = team.http.post("/v1/files", files={"file": ("t.jsonl", TRAIN)}, data={"purpose": "fine-tune"})
    return str(sent.json()["id"])


@pytest.fixture
def original(database: Database, team: Team, base: str, training: str) -> str:
    """The id of a job whose "auto" options have been decided."""
    asked = {"model": ALIAS, "training_file": training, "suffix": "again", "metadata": {"team": "search"}}
    asked |= {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 3}}}, "seed": 11}
    asked |= {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}], "priority": 2}
    made = team.http.post(ROUTE, json=asked).json()
    _decide(database, made["id"], **DECIDED)
    return str(made["id"])


def _decide(database: Database, job_id: str, **decided: Any) -> None:
    with database.sessions.begin() as session:
        job = session.get_one(Job, job_id)
        ledger.enqueue(session, job, rows.plan(**{"seed": job.spec["seed"]} | decided))


def _rerun(team: Team, job: str, **changes: Any) -> dict[str, Any]:
    answer = team.http.post(f"{ROUTE}/{job}/rerun", json=changes)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_rerun_has_the_numbers_that_were_decided(database: Database, team: Team, original: str) -> None:
    answer = team.http.post(f"{ROUTE}/{original}/rerun")  # without a body, as OpenAI's clients send actions
    again, first = answer.json(), team.http.get(f"{ROUTE}/{original}").json()
    assert (again["rerun_of"], first["rerun_of"]) == (original, None)
    assert again["id"] != original
    assert again["hyperparameters"] == {"n_epochs": 7, "batch_size": 3, "learning_rate_multiplier": "auto"}
    same = ("model", "base_model", "training_file", "seed", "technique", "learning_rate", "max_seq_length", "metadata")
    for name in (*same, "user_provided_suffix", "priority", "evaluation", "schedule"):
        assert again[name] == first[name], name
    assert again["integrations"] == [
        {"type": "wandb", "wandb": first["integrations"][0]["wandb"] | {"run_id": again["id"]}}
    ]
    events = team.http.get(f"{ROUTE}/{again['id']}/events").json()["data"]
    assert f"This job is a rerun of {original}" in [event["message"] for event in events]


def test_templates_take_the_same_time_for_now(database: Database, team: Team, original: str) -> None:
    """Otherwise a template that writes the date would render the same file differently."""
    second = _rerun(team, original)["id"]
    third = _rerun(team, second)["id"]
    with database.sessions() as session:
        first, *others = (session.get_one(Job, id) for id in (original, second, third))
        assert {job.now for job in others} == {first.created_at}
        assert all(job.created_at > first.created_at for job in others)


def test_changes_are_merged_into_the_objects_that_they_name(team: Team, original: str) -> None:
    again = _rerun(team, original, seed=12, technique={"type": "qlora", "r": 4}, evaluation={"max_rows": 5})
    assert (again["seed"], again["technique"]["r"], again["technique"]["quant_type"]) == (12, 4, "nf4")
    assert again["evaluation"]["max_rows"] == 5
    assert again["hyperparameters"]["n_epochs"] == 7


@pytest.mark.parametrize(
    ("changes", "rate", "multiplier"),
    [
        ({"seed": 12}, 0.0123, "auto"),
        ({"learning_rate": 0.5}, 0.5, "auto"),
        ({"hyperparameters": {"learning_rate_multiplier": 3}}, None, 3),
        ({"hyperparameters": {"n_epochs": 1}}, 0.0123, "auto"),
        ({"technique": {"type": "full"}}, None, "auto"),
        ({"technique": {"type": "full"}, "learning_rate": 0.5}, 0.5, "auto"),
        ({"method": {"type": "dpo"}}, None, "auto"),
    ],
)
def test_another_technique_or_method_has_another_rate(
    team: Team, original: str, changes: dict[str, Any], rate: float | None, multiplier: Any
) -> None:
    """The rate that was decided for an adapter would make a full fine-tune diverge."""
    again = _rerun(team, original, **changes)
    assert again["learning_rate"] == rate
    assert again["hyperparameters"]["learning_rate_multiplier"] == multiplier


def test_a_rate_that_was_asked_for_is_asked_for_again(database: Database, team: Team, base: str, training: str) -> None:
    knobs = {"learning_rate_multiplier": 2}
    made = team.http.post(ROUTE, json={"model": BASE, "training_file": training, "hyperparameters": knobs}).json()
    _decide(database, made["id"], **DECIDED | {"technique": Lora()})
    again = _rerun(team, made["id"], technique={"type": "full"})
    assert (again["learning_rate"], again["hyperparameters"]["learning_rate_multiplier"]) == (None, 2)


def test_a_job_that_was_never_planned_is_asked_for_again(team: Team, base: str, training: str) -> None:
    made = team.http.post(ROUTE, json={"model": BASE, "training_file": training}).json()
    again = _rerun(team, made["id"])
    assert again["hyperparameters"] == made["hyperparameters"]
    assert again["seed"] == made["seed"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sede": 1}, "sede"),
        ({"technique": {"type": "lora", "rank": 1}}, "technique.rank"),
        ({"training_file": "file-none"}, "training_file"),
        ({"select": "best"}, "select"),
    ],
)
def test_changes_are_refused_as_in_a_create(team: Team, original: str, changes: dict[str, Any], param: str) -> None:
    answer = team.http.post(f"{ROUTE}/{original}/rerun", json=changes)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_a_deleted_file_is_named(database: Database, team: Team, original: str, training: str) -> None:
    with database.sessions.begin() as session:
        session.get_one(File, training).deleted_at = func.now()
    answer = team.http.post(f"{ROUTE}/{original}/rerun")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "training_file")
    assert answer.json()["error"]["message"] == (
        f"The file '{training}' of job '{original}' has been deleted. Name another one as 'training_file' to run the "
        "job with that."
    )


def test_a_deleted_base_is_named(database: Database, team: Team, original: str) -> None:
    with database.sessions.begin() as session:
        registry.delete(session, session.get_one(Model, BASE))
    error = team.http.post(f"{ROUTE}/{original}/rerun").json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "model")
    assert f"The model '{BASE}' of job '{original}' has been deleted." in error["message"]


@pytest.mark.parametrize("part", ["file", "base"])
def test_other_bytes_under_an_old_id_are_refused(
    database: Database, team: Team, original: str, training: str, part: str
) -> None:
    """No call of the API can put them there, but a restored backup can."""
    with database.sessions.begin() as session:
        if part == "file":
            session.get_one(File, training).sha256 = "e" * 64
        else:
            session.get_one(Model, BASE).manifest_sha256 = "e" * 64
    answer = team.http.post(f"{ROUTE}/{original}/rerun")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "input_changed")
    assert f"is now {'e' * 64}" in answer.json()["error"]["message"]


def test_an_alias_that_moved_does_not_move_the_rerun(database: Database, team: Team, original: str) -> None:
    with database.sessions.begin() as session:
        registry.add_alias(session, ALIAS, rows.base(session, "other"))
    assert _rerun(team, original)["model"] == BASE


def test_a_key_makes_one_rerun(team: Team, original: str) -> None:
    key = {"idempotency-key": "k"}
    made = [team.http.post(f"{ROUTE}/{original}/rerun", headers=key).json()["id"] for _ in range(2)]
    assert made[0] == made[1] != original


def test_a_client_that_repeats_itself_gets_the_rerun_and_not_the_job(team: Team, original: str) -> None:
    retry = {"x-stainless-retry-count": "1"}
    second = team.http.post(f"{ROUTE}/{original}/rerun").json()["id"]
    assert team.http.post(f"{ROUTE}/{original}/rerun", headers=retry).json()["id"] == second
    third = team.http.post(f"{ROUTE}/{second}/rerun", headers=retry).json()["id"]
    assert third not in (original, second)
