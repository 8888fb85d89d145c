"""What time alone makes necessary, one sweeper at a time in the whole installation."""

import logging
import time

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from tunery import db, dispatch
from tunery.datasets import shelf, uploads
from tunery.datasets.model import File
from tunery.jobs import leases, ledger
from tunery.jobs.model import Job
from tunery.jobs.states import FINAL, State
from tunery.models.model import Model
from tunery.settings import Settings
from tunery.storage import Storage
from worker.supervisor import upload
from worker.supervisor.staging import StoredFolder
from worker.tasks.claims import only_here

log = logging.getLogger(__name__)

_NUDGED_FOR = 60
"""Seconds for which a queued job's wake-up is repeated. After that workers poll, or are busy: a busy worker's queue
would only fill with messages about the same job."""
_DAILY = 3600


class Sweeper:
    """Rounds of one process. Only one process's round runs at a time; the others' find the lock taken."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings, self._storage = settings, storage
        self._last_round: float | None = None
        self._tidied_at = 0.0

    def round(self) -> bool:
        """One round. Always False: the next one is due in `sweep_seconds`, not at once."""
        with only_here("sweep") as mine:
            if mine:
                self._sweep()
        return False

    def _sweep(self) -> None:
        self._pardon_after_a_gap()
        with db.transaction() as session:
            if lost := leases.expire_leases(session):
                log.warning("%d attempts lost their lease", lost)
        with db.transaction() as session:
            _nudge(session)
        self._forget_snapshots()
        if time.monotonic() - self._tidied_at > _DAILY:
            self._tidied_at = time.monotonic()
            self._storage.sweep()
        with db.transaction() as session:
            uploads.sweep(session, self._storage)
        with db.transaction() as session:
            shelf.purge(session, self._storage, ledger.live_job_using)

    def _pardon_after_a_gap(self) -> None:
        """Nobody could renew while the database was away, and nobody swept: let the living speak before leases end.

        A first round is a gap too: the machine with the database may just have come back.
        """
        now, last = time.monotonic(), self._last_round
        self._last_round = now
        if last is not None and now - last < self._settings.lease_seconds / 2:
            return
        seconds = min(self._settings.lease_seconds, max(30, 3 * self._settings.renew_seconds))
        with db.transaction() as session:
            leases.pardon(session, seconds=seconds)

    def _forget_snapshots(self) -> None:
        """Recovery snapshots of jobs that have ended: objects first, so that a crash between repeats and loses none."""
        ended = select(Job.id, Job.snapshot).where(Job.state.in_(FINAL), Job.snapshot.is_not(None)).limit(20)
        with db.transaction() as session:
            found = session.execute(ended).all()
        for job_id, snapshot in found:
            upload.remove(self._storage, StoredFolder.parse(str(snapshot)).prefix)
            with db.transaction() as session:
                session.get_one(Job, job_id).snapshot = None


def _nudge(session: Session) -> None:
    recent = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, _NUDGED_FOR)
    waits_for = {
        dispatch.TRAIN: exists().where(Job.state == State.QUEUED, Job.queued_at > recent),
        dispatch.IO: exists().where(Job.state == State.VALIDATING, Job.created_at > recent)
        | exists().where(File.status == "uploaded", File.created_at > recent)
        | exists().where(Model.status == "processing", Model.created_at > recent),
    }
    for queue, condition in waits_for.items():
        if session.scalar(select(condition)):
            dispatch.nudge_after_commit(session, queue)
