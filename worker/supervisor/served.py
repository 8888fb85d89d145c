"""Checks before a model is published whether the model server's answers match its scorecard.

The check is a separate program, on the run's devices after the trainer has ended. Its process is started before that.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Self

from sqlalchemy.orm import Session

from tunery import trainer_protocol as protocol
from tunery.jobs import leases, ledger
from tunery.jobs.leases import Lease
from tunery.settings import Settings
from worker.io.programs import Program
from worker.supervisor import served_note
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.process import environment

log = logging.getLogger(__name__)


class Check:
    """The check of one run. Its process, whose imports take 4 to 20 seconds, waits for the end of the trainer.

    A `with` block ends it, unless it has ended, however the run ends.
    """

    def __init__(self, keeper: LeaseKeeper, run_dir: Path, settings: Settings, mark: str) -> None:
        self._keeper, self._run_dir, self._settings = keeper, run_dir, settings
        self._environment = environment(keeper.lease.gpu_indexes, mark)
        self._program: Program | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def is_due(self) -> bool:
        """Whether the operator wants the check, and the run has answered test rows."""
        return self._settings.served_check_rows > 0 and (self._run_dir / protocol.GREEDY).exists()

    def make_ready(self) -> None:
        """Starts the process once the check is due; call it from a thread that outlives the check."""
        if self._program is None and self.is_due:
            with suppress(OSError):  # not the trainer's fault: `run` starts another, and says why it cannot
                self._program = self._start(["--wait"], waits=True)

    def run(self) -> protocol.Served:
        """Returns the verdict; if the check broke, one that says so. Raises LeaseLost."""
        try:
            program = self._begin()
        except OSError as error:  # the model is good, and is not trained again
            failure: str | None = f"The check of the served model could not be started: {error.strerror}."
        else:
            failure = self._wait_for(program)
        if failure is None:
            return protocol.Served.model_validate_json((self._run_dir / "out" / "served.json").read_bytes())
        reason = "The worker was shutting down." if self._keeper.draining else failure
        log.warning("the model of %s was not compared: %s", self._keeper.lease.job_id, reason)
        found = protocol.Served(status="not_compared", reason=reason)
        try:
            served_note.write(found, self._run_dir / "out")
        except OSError:  # the job says it, too
            (self._run_dir / "out" / "served.json").unlink(missing_ok=True)
        return found

    def _begin(self) -> Program:
        """Returns the process, which has got its work: the one that waits, or another if that has ended."""
        rows, tokens = self._settings.served_check_rows, self._settings.served_check_tokens
        arguments = [str(self._run_dir), str(rows), str(tokens)]
        if self._program is None or not self._program.begin(arguments):
            self._end()
            self._program = self._start(arguments)
        return self._program

    def _wait_for(self, program: Program) -> str | None:
        """Waits for the end of the process; returns why it failed, or None. Raises LeaseLost."""
        return program.outcome(
            self._keeper.drain,
            what="check of the served model",
            watch=self._keeper.check_lost,
            seconds=self._settings.served_check_seconds,
            too_slow="TUNERY_SERVED_CHECK_SECONDS, _ROWS and _TOKENS limit it.",
        )

    def _start(self, arguments: list[str], *, waits: bool = False) -> Program:
        return Program(["worker.server.check", *arguments], self._run_dir, self._environment, waits=waits)

    def _end(self) -> None:
        if self._program is not None:
            self._program.end()


def record(session: Session, lease: Lease, found: protocol.Served) -> None:
    """Writes the verdict to the job and adds an event about it. Raises LeaseLost."""
    kept = found.model_dump(mode="json") | {"withheld": found.withheld}
    leases.record_progress(session, lease, served=kept)
    ending = " The model is withheld." if found.withheld else ""
    level = "info" if found.status == "equal" else "warn"
    ledger.note(session, lease.job_id, f"{found.summary}{ending}", level=level, data={"served": kept})
