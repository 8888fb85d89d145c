"""Keeps an attempt's lease while it runs: a thread renews it and reads whether a pause was requested."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from sqlalchemy.orm import Session

from tunery import db
from tunery.db import UNREACHABLE, reason_of
from tunery.jobs import leases
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.settings import Settings
from worker.supervisor.drain import Drain

log = logging.getLogger(__name__)

STOP_NOTE = ".stopped"
_TICK = 0.2
_Result = TypeVar("_Result")


class Stoppable(Protocol):
    """A process that can be stopped when the lease is lost or a pause is requested."""

    def ask_to_stop(self) -> None: ...

    def kill(self) -> None: ...


class Interrupted(Exception):
    """The run has to stop before its process has started."""


class Undecided(Exception):
    """PostgreSQL has not noticed yet that a transaction's connection is lost."""


class _CommitOnce(Generic[_Result]):
    """Runs a function of a session in a transaction, and retries it until the commit is confirmed.

    The function is not idempotent: it adds events and removes checkpoints. After a lost connection PostgreSQL is
    therefore asked whether the transaction was committed.
    """

    def __init__(self, change: Callable[[Session], _Result]) -> None:
        self._change = change
        self._unsure: tuple[str, _Result] | None = None

    @property
    def is_unsure(self) -> bool:
        """Whether the transaction may have been committed already."""
        return self._unsure is not None

    def go(self, check: Callable[[], None]) -> _Result:
        """Runs the transaction; before a retry it calls `check`, which may raise. Raises UNREACHABLE, Undecided."""
        with db.transaction() as session:
            if self._unsure is not None:
                number, result = self._unsure
                committed = db.is_committed(session, number)
                if committed is None:
                    raise Undecided
                if committed:
                    return result
                self._unsure = None
                check()
            result = self._change(session)
            session.flush()
            written = db.transaction_id(session)
            self._unsure = None if written is None else (written, result)
        return result


def stop_note(settings: Settings, lease: Lease) -> Path:
    """Returns the path of the note that an attempt's worker had to stop while the database was unreachable."""
    return settings.runs_dir / lease.job_id / f"{lease.number}{STOP_NOTE}"


class LeaseKeeper:
    """Renews a lease until the end of a `with LeaseKeeper(...) as keeper` block, and stops the run when it must.

    If the lease is known to be lost, the process is killed at once and nothing is saved. On a pause or shutdown it is
    asked to save, and killed after the grace. An unreachable database stops nothing: killing every run when a database
    restarts would cost more than a run that turns out to have lost its lease.
    """

    def __init__(self, lease: Lease, settings: Settings, drain: Drain) -> None:
        self.lease = lease
        self.lost = False
        self.pausing = False
        self.step = 0
        self._settings, self.drain = settings, drain
        self._process: Stoppable | None = None
        self._asked_at: float | None = None
        self._silent_since: float | None = None
        self.stop_note = stop_note(settings, lease)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tunery-lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def draining(self) -> bool:
        """Whether the worker shuts down."""
        return self.drain.begun

    @property
    def stopping(self) -> bool:
        """Whether the run has to save a snapshot and end."""
        return self.pausing or self.draining

    def must_leave(self) -> bool:
        """Whether there is no time to wait for storage: the lease is lost or the worker is shutting down."""
        return self.lost or self.draining

    def check(self) -> None:
        """Raises LeaseLost or Interrupted if the preparation of a run has to stop."""
        self.check_lost()
        if self.stopping:
            raise Interrupted

    def watch(self, process: Stoppable) -> None:
        """Sets the process that is stopped from now on when the run has to stop."""
        self._process = process

    def write(self, change: Callable[[Session], _Result]) -> _Result:
        """Runs `change` in a transaction, and retries while the database does not answer. Raises LeaseLost.

        It is committed exactly once, even if the answer to its COMMIT was lost. A worker that shuts down waits for the
        database up to the grace; then the database's error is raised, and the lease expires.
        """
        delay, tried = 0.5, _CommitOnce(change)
        while True:
            if not tried.is_unsure:
                self.check_lost()
            try:
                result = tried.go(self.check_lost)
            except (*UNREACHABLE, Undecided) as error:
                if self._silent_since is None:  # once, not at every try
                    log.warning("the run of %s goes on without the database: %s", self.lease.job_id, reason_of(error))
                if self._has_waited_enough():
                    raise
            else:
                self._silent_since = None
                return result
            self._over.wait(delay)
            delay = min(2 * delay, 2 if self.drain.begun else 10)

    def _has_waited_enough(self) -> bool:
        """Whether a worker that shuts down has waited for the database as long as it may.

        The time without an answer adds up over several writes. The stop note is written at the first, as the worker may
        be killed at any moment.
        """
        self._silent_since = self._silent_since or time.monotonic()
        if not self.drain.begun:
            return False
        with suppress(OSError):
            self.stop_note.parent.mkdir(parents=True, exist_ok=True)
            self.stop_note.touch()
        return time.monotonic() - self._silent_since > self._settings.stop_grace_seconds

    def check_lost(self) -> None:
        """Raises LeaseLost if this attempt no longer holds the job."""
        if self.lost:
            raise LeaseLost(job=self.lease.job_id, attempt=self.lease.number)

    def _run(self) -> None:
        renew_at = time.monotonic() + self._settings.renew_seconds
        while not self._over.wait(_TICK):
            if time.monotonic() >= renew_at:
                self._renew()
                renew_at = time.monotonic() + self._settings.renew_seconds
            self._act()

    def _renew(self) -> None:
        try:
            with db.transaction() as session:
                request = leases.renew(
                    session, self.lease, lease_seconds=self._settings.lease_seconds, last_step=self.step
                )
            self.pausing = self.pausing or request == "pause"
        except LeaseLost:
            self.lost = True
        except Exception as error:  # noqa: BLE001  if this thread ended, the lease would expire
            log.warning("the lease of %s was not renewed (%s); the run continues", self.lease.job_id, reason_of(error))

    def _act(self) -> None:
        if self._process is None:
            return
        if self.lost:
            self._process.kill()
        elif self.stopping:
            self._stop(self._process)

    def _stop(self, process: Stoppable) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            process.ask_to_stop()
        elif time.monotonic() - self._asked_at > self._settings.stop_grace_seconds:
            process.kill()
