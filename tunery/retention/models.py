"""Removes the bytes of deleted models once nothing refers to them."""

from datetime import timedelta

from sqlalchemy import delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from tunery import db
from tunery.artifacts import manifest
from tunery.artifacts.model import Artifact
from tunery.baselines import ledger as baselines
from tunery.baselines.model import Baseline
from tunery.jobs.model import Job
from tunery.jobs.states import LIVE
from tunery.models.model import Model
from tunery.retention.history import Transaction
from tunery.storage import Storage

GRACE = timedelta(hours=1)
"""Time from a model's deletion to that of its bytes. Longer than a presigned URL works, and than a request takes that
found the model just before, such as one that creates a job on it or a chat that loads it."""
MODELS = 5
"""Models of one round."""


def reclaim(storage: Storage, *, transaction: Transaction = db.transaction, limit: int = MODELS) -> int:
    """Removes the objects of some deleted models that nothing needs. Returns the number of models.

    Objects first, then the row's mark, so that a crash between repeats the removal. No row is locked meanwhile: a
    deleted model never comes back with the bytes that it had.
    """
    with transaction() as session:
        found = _reclaimable(session, limit)
    for model_id, prefix in found:
        manifest.remove(storage, prefix)
        with transaction() as session:
            session.execute(delete(Artifact).where(Artifact.model_id == model_id))
            # A base that never became ready may be registered again meanwhile, under another prefix.
            row = update(Model).where(Model.id == model_id, Model.prefix == prefix)
            session.execute(row.values(purged_at=func.clock_timestamp()))
    return len(found)


def _reclaimable(session: Session, limit: int) -> list[tuple[str, str]]:
    """Returns ids and prefixes, in random order, so that a folder that cannot be deleted does not block the others.

    A base is kept as long as the bytes of any model tuned from it, as an adapter is useless without its base.
    """
    tuned, twin = aliased(Model), aliased(Model)
    named = or_(Baseline.model == Model.id, Baseline.order["compare"].contains(func.to_jsonb(Model.id)))
    is_needed = or_(
        exists().where(Job.state.in_(LIVE), or_(Job.base_model == Model.id, Job.parent_model == Model.id)),
        exists().where(Baseline.status.in_(baselines.LIVE), named),
        exists().where(tuned.base_id == Model.id, tuned.purged_at.is_(None)),
        exists().where(twin.prefix == Model.prefix, twin.id != Model.id, twin.purged_at.is_(None)),
    )
    query = (
        select(Model.id, Model.prefix)
        .where(Model.deleted_at < func.clock_timestamp() - GRACE)
        .where(or_(Model.purged_at.is_(None), Model.purged_at < Model.deleted_at), ~is_needed)
        .order_by(func.random())
        .limit(limit)
    )
    return [(row.id, row.prefix) for row in session.execute(query)]
