"""Decides which of a job's checkpoints are kept: the newest ones, and the best on its validation file."""

from collections.abc import Sequence

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from tunery.jobs import leases
from tunery.jobs.leases import Lease
from tunery.jobs.model import Checkpoint, Job
from tunery.jobs.states import LIVE
from tunery.models import registry
from tunery.models.model import Model


def has_step(session: Session, job_id: str, step: int) -> bool:
    """Whether the job has a checkpoint of the step."""
    query = select(Checkpoint.id).where(Checkpoint.job_id == job_id, Checkpoint.step == step)
    return session.scalar(query) is not None


def hide_old(session: Session, lease: Lease, keep: int) -> list[str]:
    """Removes the rows of checkpoints that are neither the best nor among the newest `keep`; returns their prefixes.

    A checkpoint that an active job continues from is kept and not counted. Raises LeaseLost.
    """
    job = leases.held(session, lease)
    is_needed = exists().where(Job.parent_model == Checkpoint.model_id, Job.state.in_(LIVE))
    of_job = select(Checkpoint).where(Checkpoint.job_id == job.id)
    best = _best(job, session.scalars(of_job).all())
    old = [
        checkpoint
        for checkpoint in session.scalars(of_job.where(~is_needed).order_by(Checkpoint.step.desc()).offset(keep))
        if checkpoint is not best
    ]
    models = [session.get_one(Model, checkpoint.model_id) for checkpoint in old]
    for checkpoint, model in zip(old, models, strict=True):
        registry.delete(session, model)
        session.delete(checkpoint)
    return [model.prefix for model in models]


def _best(job: Job, found: Sequence[Checkpoint]) -> Checkpoint | None:
    """Returns the checkpoint with the lowest validation loss, or, if early stopping uses the task, the highest score.
    Of equal ones, the earliest.
    """
    stopping = (job.plan or {}).get("early_stopping") or {}
    name, sign = ("task_score", -1) if stopping.get("metric") == "task" else ("full_valid_loss", 1)
    measured = [checkpoint for checkpoint in found if name in checkpoint.metrics]
    return min(measured, key=lambda each: (sign * each.metrics[name], each.step), default=None)
