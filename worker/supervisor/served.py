"""Checks before a model is published whether the model server's answers match its scorecard.

The check is a separate program, on the run's devices after the trainer has ended.
"""

import logging
from pathlib import Path

from sqlalchemy.orm import Session

from tunery import trainer_protocol as protocol
from tunery.jobs import leases, ledger
from tunery.jobs.leases import Lease
from tunery.settings import Settings
from worker.io import programs
from worker.supervisor.lease import LeaseKeeper
from worker.supervisor.process import environment

log = logging.getLogger(__name__)


def is_due(run_dir: Path, settings: Settings) -> bool:
    """Whether the operator wants the check, and the run has answered test rows."""
    return settings.served_check_rows > 0 and (run_dir / protocol.GREEDY).exists()


def check(keeper: LeaseKeeper, run_dir: Path, settings: Settings, mark: str) -> protocol.Served:
    """Returns the verdict; if the check broke, one that says so. Raises LeaseLost."""
    rows = settings.served_check_rows
    failure = programs.run(
        ["worker.server.parity", str(run_dir), str(rows), str(settings.served_check_tokens)],
        run_dir,
        keeper.drain,
        what="check of the served model",
        variables=environment(keeper.lease.gpu_indexes, mark),
        watch=keeper.check_lost,
        seconds=settings.served_check_seconds,
        too_slow="TUNERY_SERVED_CHECK_SECONDS, _ROWS and _TOKENS limit it.",
    )
    if failure is None:
        return protocol.Served.model_validate_json((run_dir / "out" / "served.json").read_bytes())
    reason = "The worker was shutting down." if keeper.draining else failure
    log.warning("the model of %s was not compared: %s", keeper.lease.job_id, reason)
    return protocol.Served(status="not_compared", reason=reason)


def record(session: Session, lease: Lease, found: protocol.Served) -> None:
    """Writes the verdict to the job and adds an event about it. Raises LeaseLost."""
    kept = found.model_dump(mode="json") | {"withheld": found.withheld}
    leases.record_progress(session, lease, served=kept)
    ending = " The model is withheld." if found.withheld else ""
    level = "info" if found.status == "equal" else "warn"
    ledger.note(session, lease.job_id, f"{found.summary}{ending}", level=level, data={"served": kept})
