"""Models that a job's gate or the check of the served model withholds, through real workers, and their publication."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.jobs import gate
from tunery.jobs.model import Job
from tunery.keys import auth
from tunery.keys.model import Project
from tunery.models.model import Model


def _withheld(workshop: Workshop, job_id: str) -> dict[str, bool]:
    """Returns, for each kind of a job's models, whether it is withheld."""
    with workshop.session() as session:
        return {row.kind: row.withheld for row in session.scalars(select(Model).where(Model.job_id == job_id))}


def _publish(workshop: Workshop, job_id: str) -> str:
    """Publishes a job's model; returns the id of the key that did it."""
    with workshop.session() as session:
        _, secret = auth.create_key(session, session.get_one(Project, workshop.project_id), "owner")
        caller = auth.authenticate(session, secret)
        gate.publish(session, caller, job_id, reason="it is for a test")
        return str(caller.key_id)


def _submit(workshop: Workshop, **asked: Any) -> str:
    workshop.start("io")
    workshop.start("train")
    training, test = workshop.file(training_rows(12)), workshop.file(training_rows(2, first=200))
    return workshop.submit(training, test=test, gate=asked)


@pytest.mark.slow
def test_a_gate_withholds_what_it_fails(workshop: Workshop) -> None:
    strict = _submit(workshop, min_task_gain=0.9, on_inconclusive="withhold")

    kept = workshop.until_state(strict, "succeeded")

    assert kept.gate is not None
    assert (kept.gate["withheld"], kept.withholds_model) == (True, True)
    assert _withheld(workshop, strict) == {"tuned": True, "checkpoint": True}
    [said] = [line for line in workshop.story(strict) if line.startswith("Gate ")]
    assert "so the model is withheld: gain on the task at least 0.9" in said
    assert f"Withheld fine-tuned model created: {kept.tuned_model}" in workshop.story(strict)

    key = _publish(workshop, strict)
    with workshop.session() as session:
        published = session.get_one(Job, strict).gate
    assert published is not None
    assert (published["published"]["reason"], published["published"]["key"]) == ("it is for a test", key)
    assert published["status"] == kept.gate["status"]
    assert _withheld(workshop, strict) == {"tuned": False, "checkpoint": False}


@pytest.mark.slow
def test_a_gate_withholds_nothing_that_passes(workshop: Workshop) -> None:
    mild = _submit(workshop, max_kl=100.0)

    passed = workshop.until_state(mild, "succeeded")

    assert passed.gate is not None
    assert (passed.gate["status"], passed.withholds_model) == ("passed", False)
    assert _withheld(workshop, mild) == {"tuned": False, "checkpoint": False}


@pytest.mark.slow
def test_model_that_the_server_answers_otherwise_is_withheld(workshop: Workshop) -> None:
    """A plug-in breaks the model server: prompts lose their last token."""
    fixtures = str(Path(__file__).parents[1] / "fixtures")
    broken = {"TUNERY_PLUGINS": "toy_short_prompts", "PYTHONPATH": fixtures, "TUNERY_SERVED_CHECK_ROWS": "3"}
    workshop.start("io")
    workshop.start("train", **broken)
    training, test = workshop.file(training_rows(12)), workshop.file(training_rows(3, first=200))

    job_id = workshop.submit(training, test=test)
    job = workshop.until_state(job_id, "succeeded")

    assert job.served is not None
    assert (job.served["status"], job.served["rows"], job.withholds_model) == ("differs", 3, True)
    found = job.served["first_difference"]
    assert (found["row"], found["place"], found["served"]) == (1, "prompt", None)
    [said] = [line for line in workshop.story(job_id) if line.startswith("The model server ")]
    assert f"row 1, token {found['position']} of the prompt: the end instead of `{found['trained']}`" in said
    assert said.endswith("The model is withheld.")
    assert _withheld(workshop, job_id) == {"tuned": True, "checkpoint": False}

    key = _publish(workshop, job_id)

    with workshop.session() as session:
        published = session.get_one(Job, job_id).served
    assert published is not None
    assert (published["published"]["key"], published["status"]) == (key, "differs")
    assert _withheld(workshop, job_id) == {"tuned": False, "checkpoint": False}
