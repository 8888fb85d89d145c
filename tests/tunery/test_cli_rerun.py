"""`tunery jobs rerun` and `reproduce` against a real API."""

import json

import pytest
import rows
from cloned_databases import Database
from commands import Run

from tunery.artifacts.model import Artifact
from tunery.cli import reruns
from tunery.jobs import ledger
from tunery.jobs.model import Job, Metric
from tunery.jobs.states import State
from tunery.keys import projects
from tunery.spec import Qlora


@pytest.fixture
def original(database: Database, api: str) -> str:
    with database.sessions.begin() as session:
        job = rows.job(session, projects.find_project(session, "default"), State.QUEUED)
        job.plan = rows.plan(technique=Qlora(r=8)).model_dump(mode="json")
        return job.id


def test_a_rerun_is_started_and_named(tunery: Run, original: str, database: Database) -> None:
    status, out, err = tunery("jobs", "rerun", original)
    assert status == 0
    assert f"tunery jobs watch {out.strip()}" in err
    with database.sessions() as session:
        assert session.get_one(Job, out.strip()).rerun_of == original


def test_settings_change_the_jobs_own_technique(tunery: Run, original: str) -> None:
    status, out, _ = tunery("jobs", "rerun", original, "--seed", 9, "--set", "technique.r=4", "--json")
    again = json.loads(out)
    assert (status, again["seed"], again["technique"]["type"], again["technique"]["r"]) == (0, 9, "qlora", 4)


def test_what_the_api_refuses_is_said(tunery: Run, original: str) -> None:
    status, _, err = tunery("jobs", "rerun", original, "--set", "sede=1")
    assert status == 1
    assert "Unknown parameter: 'sede'. Did you mean 'seed'?" in " ".join(err.split())


# --- reproduce ----------------------------------------------------------------------------------------------------


def _ended(database: Database, job_id: str, losses: list[float], weights: str) -> None:
    """Stores what a comparison reads of a run, except the record of its versions."""
    with database.sessions.begin() as session:
        job = session.get_one(Job, job_id)
        if job.state != State.SUCCEEDED:
            ledger.move(session, job, State.RUNNING, message="started", fence=job.fence + 1)
            final = rows.final_values(session, job, State.SUCCEEDED)
            ledger.move(session, job, State.SUCCEEDED, message="ended", **final)
        session.add_all(Metric(job_id=job_id, step=step, values={"train_loss": x}) for step, x in enumerate(losses, 1))
        path = "adapter_model.safetensors"
        session.add(Artifact(model_id=job.tuned_model, path=path, bytes=1, sha256=weights * 64, key=f"{job_id}/a"))


def _rerun(tunery: Run, database: Database, original: str, *options: object) -> str:
    again = json.loads(tunery("jobs", "rerun", original, "--json", *options)[1])["id"]
    with database.sessions.begin() as session:
        plan = rows.plan(technique=Qlora(r=8), seed=options[-1] if options else 1)
        ledger.enqueue(session, session.get_one(Job, again), plan)
    return str(again)


@pytest.mark.parametrize(
    ("losses", "weights", "options", "status", "said"),
    [
        ([2.0, 1.0], "a", [], 0, "reproduces {original}: the weights are equal, bit for bit"),
        ([2.0, 1.004], "b", [], 0, "reproduces {original}: losses within 0.005"),
        ([2.0, 1.004], "b", ["--tolerance", 0.001], 1, "largest relative difference 3.98e-03 at step 2, of 2 compared"),
        ([2.0, 1.1], "b", [], 1, "differs from {original}"),
        ([2.0], "b", [], 1, "train_loss: 2 steps and 1, 1 of them in both"),
    ],
    ids=["bitwise", "close", "not close enough", "far", "shorter"],
)
def test_a_reproduction_is_judged_by_weights_or_losses(
    tunery: Run,
    database: Database,
    original: str,
    losses: list[float],
    weights: str,
    options: list[object],
    status: int,
    said: str,
) -> None:
    again = _rerun(tunery, database, original)
    _ended(database, original, [2.0, 1.0], "a")
    _ended(database, again, losses, weights)
    found, out, _ = tunery("jobs", "reproduction", again, *options)
    assert (found, said.format(original=original) in out) == (status, True), out


def test_another_seed_is_no_reproduction_however_near(tunery: Run, database: Database, original: str) -> None:
    again = _rerun(tunery, database, original, "--seed", 9)
    for job in (original, again):
        _ended(database, job, [2.0, 1.0], "a")
    status, out, _ = tunery("jobs", "reproduction", again)
    assert status == 1
    assert [line.split() for line in out.splitlines()][1] == ["seed", "1", "9"]
    found = json.loads(tunery("jobs", "reproduction", again, "--json")[1])
    assert (found["status"], found["bitwise"]) == ("differs", True)
    assert [pair["name"] for pair in found["inputs"] if pair["equal"] is False] == ["seed"]


def test_a_reproduction_is_started_and_waited_for(
    tunery: Run, database: Database, original: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker runs here; tests/worker/test_rerun.py has real runs."""
    _ended(database, original, [2.0], "a")
    status, out, err = tunery("jobs", "reproduce", original)
    again = out.strip()
    assert (status, f"tunery jobs reproduction {again}" in err) == (0, True)
    assert tunery("jobs", "reproduction", again)[0] == 1
    with database.sessions.begin() as session:
        ledger.enqueue(session, session.get_one(Job, again), rows.plan(technique=Qlora(r=8)))
    _ended(database, again, [2.0], "a")
    monkeypatch.setattr(reruns, "start", lambda *_: {"id": again})
    status, out, _ = tunery("jobs", "reproduce", original, "--wait", "--json")
    assert (status, json.loads(out)["status"]) == (0, "reproduced")


def test_jobs_that_cannot_be_compared_are_named(tunery: Run, database: Database, original: str) -> None:
    assert "is not a rerun" in tunery("jobs", "reproduction", original)[2]
    again = _rerun(tunery, database, original)
    with database.sessions.begin() as session:
        ledger.cancel(session, session.get_one(Job, again).project_id, again)
    said = " ".join(tunery("jobs", "reproduction", again)[2].split())
    assert f"'{again}' is cancelled, so it cannot be compared" in said
