"""A job with a gate, through real workers: what it withholds, and how its owner publishes it."""

from sqlalchemy import select
from workshop import Workshop, training_rows

from tunery.jobs import gate
from tunery.jobs.model import Job
from tunery.keys import ring
from tunery.keys.model import Project
from tunery.models.model import Model


def _withheld(workshop: Workshop, job_id: str) -> dict[str, bool]:
    """Whether each model of a job is, by its kind."""
    with workshop.session() as session:
        return {row.kind: row.withheld for row in session.scalars(select(Model).where(Model.job_id == job_id))}


def test_a_gate_withholds_what_it_fails_and_nothing_else(workshop: Workshop) -> None:
    workshop.start("io")
    workshop.start("train")
    training, test = workshop.file(training_rows(12)), workshop.file(training_rows(2, first=200))
    strict = workshop.submit(training, test=test, gate={"min_task_gain": 0.9, "on_inconclusive": "withhold"})
    mild = workshop.submit(training, test=test, gate={"max_kl": 100.0})

    kept, passed = (workshop.until_state(id, "succeeded") for id in (strict, mild))

    assert kept.gate is not None
    assert (kept.gate["withheld"], kept.withholds_model) == (True, True)
    assert _withheld(workshop, strict) == {"tuned": True, "checkpoint": True}
    [said] = [line for line in workshop.story(strict) if line.startswith("Gate ")]
    assert "so the model is withheld: gain on the task at least 0.9" in said
    assert f"Withheld fine-tuned model created: {kept.tuned_model}" in workshop.story(strict)
    assert passed.gate is not None
    assert (passed.gate["status"], passed.withholds_model) == ("passed", False)
    assert _withheld(workshop, mild) == {"tuned": False, "checkpoint": False}

    with workshop.session() as session:
        _, secret = ring.create_key(session, session.get_one(Project, workshop.project_id), "owner")
        caller = ring.authenticate(session, secret)
        gate.publish(session, caller, strict, reason="it is for a test")
    with workshop.session() as session:
        published = session.get_one(Job, strict).gate
    assert published is not None
    assert (published["published"]["reason"], published["published"]["key"]) == ("it is for a test", caller.key_id)
    assert published["status"] == kept.gate["status"]
    assert _withheld(workshop, strict) == {"tuned": False, "checkpoint": False}
