"""A slot: one process of a training worker, which works on one job at a time."""

import logging
import os
import re
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import db, processes
from tunery.jobs import leases, queue
from tunery.jobs.leases import Lease
from tunery.jobs.model import Attempt
from tunery.jobs.queue import Offer
from tunery.settings import Settings
from tunery.storage import open_storage
from worker.supervisor import attempt, devices
from worker.supervisor.devices import Device, DriverFails
from worker.supervisor.drain import Drain
from worker.supervisor.lease import STOP_NOTE
from worker.supervisor.process import MARK, Trainers

log = logging.getLogger(__name__)


class Slot:
    """Claims jobs for its host's free devices and runs them.

    `name` (`train@host/0`) must stay the same over restarts of the worker: a restarted slot finds its old attempts by
    it, and ends them before it claims a job.
    """

    def __init__(self, name: str, settings: Settings, drain: Drain, found: list[Device]) -> None:
        self.name = name
        self._settings, self._drain = settings, drain
        self._storage = open_storage(settings)
        self._devices = found
        self._lock_path = settings.runs_dir / ".slots" / f"{re.sub(r'[^A-Za-z0-9@._-]', '-', name)}.lock"
        self._lock: int | None = None
        log_path = self._lock_path.with_suffix(".log") if settings.preload_trainer else None
        self._trainers = Trainers(self._mark, _first_gpu(name, found), log_path)

    def show(self) -> None:
        """Writes this host's devices to the database."""
        with db.transaction() as session:
            for device in self._devices:
                leases.show_device(session, devices.as_row(device))

    def withdraw(self) -> None:
        """Records that this worker was stopped, so that its devices do not count as fallen silent."""
        with db.transaction() as session:
            leases.withdraw_devices(session, [devices.as_row(device).id for device in self._devices])

    def look(self) -> bool:
        """Claims and runs one job, if there is one; returns whether to look again at once."""
        if self._drain.begun or not self._devices or not self._take_over():
            return False
        self._trainers.make_ready()
        lease = self._claim()
        if lease is None:
            return False
        attempt.run(lease, settings=self._settings, storage=self._storage, drain=self._drain, trainers=self._trainers)
        return True

    def _claim(self) -> Lease | None:
        try:
            idle = frozenset(device.index for device in devices.idle_devices(self._devices))
        except DriverFails as error:
            log.error("no job is taken: %s", error)  # noqa: TRY400 (the reason is the whole story)
            return None
        if not idle:
            return None
        offer = Offer(devices.host(), self.name, {device.index: device.memory_bytes for device in self._devices}, idle)
        with db.transaction() as session:
            return queue.claim(session, offer, lease_seconds=self._settings.lease_seconds)

    @property
    def _mark(self) -> str:
        # The lock's path, not the name: two installations on one host may have slots of the same name.
        return str(self._lock_path)

    def _take_over(self) -> bool:
        """Ensures, once, that no other slot has this name, and ends what its predecessor left; returns success."""
        if self._lock is not None:
            return True
        lock = self._hold_lock()
        if lock is None:
            log.error("another process uses the slot %s; give each worker of a host its own name (-n)", self.name)
            return False
        killed = processes.kill_marked(MARK, self._mark)
        notes = list(self._settings.runs_dir.glob(f"*/*{STOP_NOTE}"))
        stopped = [(note.parent.name, int(note.name.removesuffix(STOP_NOTE))) for note in notes]
        with db.transaction() as session:
            reaped = leases.reap_slot(session, self.name, stopped=stopped)
            live = _live_attempts(session)
        if killed or reaped:
            log.warning(
                "slot %s took over from an earlier process, which left %d processes and %d attempts",
                self.name,
                killed,
                reaped,
            )
        for note, attempt_of in zip(notes, stopped, strict=True):
            if attempt_of not in live:  # else another slot has to read it
                note.unlink(missing_ok=True)
        self._clean_runs()
        self._lock = lock
        return True

    def _hold_lock(self) -> int | None:
        """Locks the slot's name; returns the open descriptor, whose lock the kernel frees when the process ends, or
        None.
        """
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        if processes.lock(lock):
            return lock
        os.close(lock)
        return None

    def _clean_runs(self) -> None:
        """Cleans run directories of attempts that are not live any more; the host's other slots have live ones."""
        # Listed before the database is asked: a claim is committed before its directory is made, so a directory of a
        # claim made in between is not in the list. The other way round, it would be taken for a dead one.
        found = [folder for folder in self._settings.runs_dir.glob("*/*") if _is_run(folder)]
        with db.transaction() as session:
            known = {(job, str(number)) for job, number in _live_attempts(session)}
        for run_dir in found:
            if (run_dir.parent.name, run_dir.name) not in known:
                attempt.clean(run_dir)


def _first_gpu(name: str, found: list[Device]) -> tuple[int, ...]:
    """Returns the GPU that a slot's first job probably gets: one for each of the host's numbered slots."""
    gpus = [device.index for device in found if device.index is not None]
    number = name.rpartition("/")[2]
    return (gpus[int(number) % len(gpus)],) if gpus and number.isdigit() else tuple(gpus[:1])


def _live_attempts(session: Session) -> set[tuple[str, int]]:
    rows = session.execute(select(Attempt.job_id, Attempt.number).where(Attempt.ended_at.is_(None)))
    return {(job, number) for job, number in rows}


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and folder.name.isdigit()
