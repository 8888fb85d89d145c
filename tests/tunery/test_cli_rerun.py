"""`tunery jobs rerun` against a real API."""

import json

import pytest
import rows
from commands import Run
from databases import Database

from tunery.jobs.model import Job
from tunery.jobs.states import State
from tunery.keys import ring
from tunery.spec import Qlora


@pytest.fixture
def original(database: Database, api: str) -> str:
    with database.sessions.begin() as session:
        job = rows.job(session, ring.find_project(session, "default"), State.QUEUED)
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
