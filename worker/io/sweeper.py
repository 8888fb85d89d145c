"""Does the work that becomes due with time, in one process of the whole installation at a time."""

import logging
import time

from sqlalchemy import exists, func, select, update

from tunery import db, dispatch
from tunery.artifacts import manifest
from tunery.baselines.ledger import live_user_of
from tunery.baselines.model import Baseline
from tunery.datasets import files, uploads
from tunery.datasets.model import File, FileReport
from tunery.jobs import leases, quoting
from tunery.jobs.model import Attempt, Job
from tunery.jobs.states import State
from tunery.models.model import Model
from tunery.retention import history, models
from tunery.settings import Settings
from tunery.storage import Storage
from worker.io.claims import advisory_lock
from worker.outages import OUTAGES

log = logging.getLogger(__name__)

_NUDGED_FOR = 60
"""Seconds for which a queued job's wake-up is repeated. After that workers poll or are busy, and a busy worker's queue
would only fill with messages about the same job.
"""
_MINUTE, _HOUR = 60, 3600
_JOBS_A_ROUND = 20


class Sweeper:
    """Sweeps in rounds. Only one process's round runs at a time; the others find the lock taken."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings, self._storage = settings, storage
        self._last_round: float | None = None
        self._tidied_at = 0.0
        self._history_due = self._models_due = 0.0

    def round(self) -> bool:
        """Does one round. Returns False: the next one is due in `sweep_seconds`, not at once."""
        with advisory_lock("sweep") as mine:
            if mine:
                self._sweep()
        return False

    def _sweep(self) -> None:
        steps = (
            self._pardon_after_a_gap,
            _expire_leases,
            _nudge,
            self._tidy_jobs,
            self._tidy_storage,
            self._tidy_uploads,
            self._purge_files,
            self._reclaim_models,
            self._remove_history,
        )
        for step in steps:
            # Each for itself: failing storage must not keep leases from expiring, nor one step the next.
            with OUTAGES.survived(f"the sweeper's step {step.__name__.strip('_')}"):
                step()

    def _pardon_after_a_gap(self) -> None:
        """Extends leases after an outage, during which no worker could renew, so that live workers can do so now.

        The first round counts as after an outage: the database's machine may just have restarted.
        """
        now, last = time.monotonic(), self._last_round
        self._last_round = now
        if last is not None and now - last < self._settings.lease_seconds / 2:
            return
        seconds = min(self._settings.lease_seconds, max(30, 3 * self._settings.renew_seconds))
        with db.transaction() as session:
            leases.pardon(session, seconds=seconds)

    def _tidy_jobs(self) -> None:
        """Removes the objects of some ended jobs, except models and logs: snapshots, and what attempts that were killed
        or lost their lease had stored.

        A live attempt may still store something. A job's objects are listed once, unless a late attempt asks for it
        again. Jobs come in random order, so that one whose objects storage does not delete holds up no other.
        """
        lives = exists().where(Attempt.job_id == Job.id, Attempt.ended_at.is_(None))
        ended = select(Job.id).where(Job.finished_at.is_not(None), ~Job.storage_cleaned, ~lives)
        with db.transaction() as session:
            found = session.scalars(ended.order_by(func.random()).limit(_JOBS_A_ROUND)).all()
        for job_id in found:
            self._tidy(job_id)

    def _tidy(self, job_id: str) -> None:
        """Removes a job's objects before it updates the row, so that a crash in between repeats work and loses none."""
        with db.transaction() as session:
            if (job := session.get(Job, job_id)) is not None:  # its project may have been deleted meanwhile
                quoting.conclude_unfinished(session, job, self._settings)
            prefixes = session.scalars(select(Model.prefix).where(Model.job_id == job_id)).all()
        kept = tuple(f"{prefix}/" for prefix in (f"jobs/{job_id}/logs", *prefixes))
        doomed = [key for key in self._storage.list(f"jobs/{job_id}/") if not key.startswith(kept)]
        # Manifests first: without one a folder is not a model, and nobody takes the remaining files for a complete one.
        for key in sorted(doomed, key=lambda key: not key.endswith(f"/{manifest.NAME}")):
            self._storage.delete(key)
        with db.transaction() as session:
            # Not through the row's object, as the row may have been deleted too.
            session.execute(update(Job).where(Job.id == job_id).values(snapshot=None, storage_cleaned=True))

    def _tidy_storage(self) -> None:
        if time.monotonic() - self._tidied_at > _HOUR:
            self._tidied_at = time.monotonic()
            self._storage.sweep()

    def _tidy_uploads(self) -> None:
        with db.transaction() as session:
            uploads.sweep(session, self._storage)

    def _purge_files(self) -> None:
        with db.transaction() as session:
            files.purge(session, self._storage, live_user_of)

    def _reclaim_models(self) -> None:
        if time.monotonic() >= self._models_due:
            found = models.reclaim(self._storage)
            self._models_due = time.monotonic() + (0 if found else _MINUTE)

    def _remove_history(self) -> None:
        """Removes one batch each round while there are more, then none for an hour."""
        if time.monotonic() >= self._history_due:
            more = history.remove_old(self._settings, self._storage)
            self._history_due = time.monotonic() + (0 if more else _HOUR)


def _expire_leases() -> None:
    with db.transaction() as session:
        if lost := leases.expire_leases(session):
            log.warning("%d attempts lost their lease", lost)


def _nudge() -> None:
    recent = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, _NUDGED_FOR)
    waits_for = {
        dispatch.TRAIN: exists().where(Job.state == State.QUEUED, Job.queued_at > recent),
        dispatch.IO: exists().where(Job.state == State.VALIDATING, Job.created_at > recent)
        | exists().where(File.status == "uploaded", File.created_at > recent)
        | exists().where(FileReport.status == "queued", FileReport.created_at > recent)
        | exists().where(Baseline.status == "queued", Baseline.created_at > recent)
        | exists().where(Model.status == "processing", Model.created_at > recent),
    }
    with db.transaction() as session:
        for queue, condition in waits_for.items():
            if session.scalar(select(condition)):
                dispatch.nudge_after_commit(session, queue)
