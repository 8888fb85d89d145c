"""Models that a gate withholds: only their job names them until they are published."""

from typing import Any

import pytest
import rows
from cloned_databases import Database
from teams import Team

from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.models.model import Model
from tunery.spec import Gate, TrainingSpec

CHECK = {"name": "max_kl", "limit": 0.1, "value": 0.5, "low": 0.4, "high": 0.6, "status": "failed"}
VERDICT = {"status": "failed", "withheld": True, "checks": [CHECK]}
CHAT = {"messages": [{"role": "user", "content": "q"}]}


@pytest.fixture
def withheld(database: Database, team: Team, base: str) -> tuple[str, str]:
    """The ids of a job and of its model, which the gate withholds."""
    spec = TrainingSpec(seed=1, gate=Gate(max_kl=0.1)).model_dump(mode="json")
    with database.sessions.begin() as session:
        owner = session.get_one(Project, team.id)
        job = rows.job(session, owner, State.SUCCEEDED, base_model=base, spec=spec)
        job.gate, job.plan = VERDICT, {**(job.plan or {}), "gate": spec["gate"]}
        session.get_one(Model, job.tuned_model).withheld = True
        return job.id, str(job.tuned_model)


def _uses(team: Team, job: str, model: str) -> list[Any]:
    """The responses to all requests that name the model."""
    return [
        team.http.get(f"/v1/models/{model}"),
        team.http.get(f"/v1/models/{model}/artifacts"),
        team.http.get(f"/v1/fine_tuning/jobs/{job}/artifacts"),
        team.http.get(f"/v1/fine_tuning/jobs/{job}/artifacts/adapter.safetensors"),
        team.http.post("/v1/chat/completions", json={"model": model, **CHAT}),
        team.http.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": "file-x"}),
    ]


def test_a_withheld_model_is_found_nowhere_but_in_its_job(team: Team, withheld: tuple[str, str]) -> None:
    job, model = withheld
    for answer in _uses(team, job, model):
        assert answer.status_code == 404, answer.request.url
        error = answer.json()["error"]
        assert error["code"] == "model_withheld"
        assert f"POST /v1/fine_tuning/jobs/{job}/publish" in error["message"]
    assert model not in [each["id"] for each in team.http.get("/v1/models?status=any").json()["data"]]
    shown = team.http.get(f"/v1/fine_tuning/jobs/{job}").json()
    assert (shown["status"], shown["fine_tuned_model"]) == ("succeeded", None)
    gate = shown["gate"]
    assert (gate["max_kl"], gate["status"], gate["checks"]) == (0.1, "failed", [CHECK])
    assert (gate["withheld_model"], gate["published"]) == (model, None)


def test_publishing_keeps_the_verdict_and_says_who_did_it(
    team: Team, withheld: tuple[str, str], database: Database
) -> None:
    job, model = withheld
    unexplained = team.http.post(f"/v1/fine_tuning/jobs/{job}/publish", json={"reason": ""})
    assert (unexplained.status_code, unexplained.json()["error"]["param"]) == (400, "reason")

    shown = team.http.post(f"/v1/fine_tuning/jobs/{job}/publish", json={"reason": "we route tickets"}).json()

    assert shown["fine_tuned_model"] == model
    with database.sessions.begin() as session:
        key = session.get_one(Job, job).gate["published"]["key"]  # type: ignore[index]
    published = shown["gate"]["published"]
    assert (published["reason"], published["key"]) == ("we route tickets", key)
    assert (shown["gate"]["status"], shown["gate"]["withheld_model"]) == ("failed", None)
    assert team.http.get(f"/v1/models/{model}").status_code == 200
    [event] = [e for e in team.http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"] if e["level"] == "warn"]
    assert event["message"] == f"The withheld model {model} was published by key {key}: we route tickets"
    again = team.http.post(f"/v1/fine_tuning/jobs/{job}/publish", json={"reason": "once more"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "wrong_state")


SERVED = {
    "status": "differs", "withheld": True, "rows": 9, "equal": 8, "ties": 0, "tokens": 70, "precision": "float32",
    "first_difference": {
        "row": 4, "place": "answer", "position": 2, "trained": "a", "served": "b", "gap": 0.4,
    },
}  # fmt: skip


def test_model_that_is_served_otherwise_is_withheld_until_it_is_published(
    team: Team, withheld: tuple[str, str], database: Database
) -> None:
    job, model = withheld
    with database.sessions.begin() as session:
        row = session.get_one(Job, job)
        row.gate, row.served = {**VERDICT, "status": "passed", "withheld": False}, SERVED

    shown = team.http.get(f"/v1/fine_tuning/jobs/{job}").json()
    assert (shown["fine_tuned_model"], shown["gate"]["withheld_model"]) == (None, None)
    wanted = {name: value for name, value in SERVED.items() if name != "withheld"}
    assert shown["served"] == {**wanted, "reason": None, "withheld_model": model, "published": None}
    assert team.http.get(f"/v1/models/{model}").json()["error"]["code"] == "model_withheld"

    shown = team.http.post(f"/v1/fine_tuning/jobs/{job}/publish", json={"reason": "one row"}).json()

    assert (shown["fine_tuned_model"], shown["served"]["withheld_model"]) == (model, None)
    assert shown["served"]["published"]["reason"] == "one row"
    assert shown["gate"]["published"] is None
    assert team.http.get(f"/v1/models/{model}").status_code == 200


def test_a_withheld_model_can_be_deleted(team: Team, withheld: tuple[str, str]) -> None:
    assert team.http.delete(f"/v1/models/{withheld[1]}").json()["deleted"] is True
    assert team.http.get(f"/v1/models/{withheld[1]}").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"gate": {"max_kl": 0.1}}, "gate", "Send evaluation.test_file"),
        ({"gate": {}}, "gate", "send min_task_gain, max_general_drop or max_kl"),
        ({"gate": {"max_kl": -1}}, "gate.max_kl", "0"),
        ({"gate": {"min_task_gain": 5}}, "gate.min_task_gain", "1"),
        (
            {"gate": {"max_general_drop": 0.1}, "evaluation": {"test_file": "x", "general": {"enabled": False}}},
            "gate.max_general_drop",
            "evaluation.general.enabled",
        ),
        (
            {"gate": {"max_kl": 0.1}, "evaluation": {"test_file": "x", "general": {"prompts": 0}}},
            "gate.max_kl",
            "general prompts",
        ),
    ],
)
def test_a_gate_whose_figures_are_not_measured_is_refused(
    team: Team, base: str, changes: dict[str, Any], param: str, says: str
) -> None:
    answer = team.http.post("/v1/fine_tuning/jobs", json={"model": base, "training_file": "file-x", **changes})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert says in answer.json()["error"]["message"]
