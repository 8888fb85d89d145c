"""Publishes a model that its job's gate, or the check of the served model, withholds."""

from sqlalchemy.orm import Session

from tunery import db
from tunery.errors import WrongState
from tunery.jobs import ledger
from tunery.jobs.model import Job
from tunery.keys.auth import Caller
from tunery.models import registry


def publish(session: Session, caller: Caller, job_id: str, *, reason: str) -> Job:
    """Publishes the job's withheld model. The verdict stays; who published the model and why is recorded beside it
    and in an event.

    Raises NotFound, and WrongState where nothing is withheld.
    """
    job = ledger.find(session, caller.project_id, job_id, lock=True)
    if job.tuned_model is None or not job.withholds_model:
        raise WrongState(
            kind="Fine-tuning job",
            id=job_id,
            state=job.state,
            action="published",
            instead="Only a withheld model can be published.",
        )
    published = {"reason": reason, "key": caller.key_id, "at": int(db.now(session).timestamp())}
    for name, found in (("gate", job.gate), ("served", job.served)):
        if found is not None and found["withheld"]:
            setattr(job, name, {**found, "published": published})
    registry.publish(session, job.id)
    message = f"The withheld model {job.tuned_model} was published by key {caller.key_id}: {reason}"
    ledger.note(session, job.id, message, level="warn", data={"published": published})
    return job
