"""One attempt at a job, from its claim to the end of its lease.

    lay out the run directory -> spawn the trainer -> write down what it says -> publish what it made

Ends, by what was seen last:

    exit 0 after Finished                the job succeeded
    Failed user_error, nan_loss, gpu_oom the job failed; trying again would end the same way
    exit 75, or killed after the grace   the pause is done, or the worker stops: back to the queue, not counted
    anything else                        crashed: back to the queue, counted
    LeaseLost                            the job was cancelled or taken over: everything is dropped
"""

import logging
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import update
from sqlalchemy.orm import Session

from tunery import db, wire
from tunery.artifacts.manifest import Manifest
from tunery.datasets import shelf
from tunery.db import UNREACHABLE
from tunery.errors import TuneryError
from tunery.failures import JobFailure, TrainingCrashed
from tunery.jobs import leases, ledger, quoting
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.jobs.model import Job
from tunery.models import registry
from tunery.settings import Settings
from tunery.storage import Storage, Stored
from tunery.storage.errors import StorageFailed
from worker.supervisor import staging, upload
from worker.supervisor.deeds import Scribe, add_model
from worker.supervisor.drain import Drain
from worker.supervisor.lease import Hold, Interrupted
from worker.supervisor.process import Trainer, Trainers
from worker.supervisor.trackers import Trackers

log = logging.getLogger(__name__)

RESULTS = "step_metrics.csv"
"""The result file's name, as OpenAI gives it."""
_SILENCE = 0.5
"""Seconds without a message after which batches are written all the same."""

_WHOLE_RUN = 6 * 3600
_NO_PROGRESS = {"type", "path", "spent", "step_times"}
"""Seconds for which a finished run waits for storage: doing it again would take longer."""

LastDeed = Callable[[Session], None]
"""What ends the attempt, in one transaction."""


def run(lease: Lease, *, settings: Settings, storage: Storage, drain: Drain, trainers: Trainers) -> None:
    """Carries the attempt out and ends its lease, whatever becomes of the run; see the module's head.

    Raises only when the database stays away while the worker shuts down; the slot's next life then ends the lease.
    """
    run_dir = settings.runs_dir / lease.job_id / str(lease.number)
    log.info("attempt %d of %s begins in %s", lease.number, lease.job_id, run_dir)
    with Hold(lease, settings, drain) as hold:
        try:
            hold.write(_carry_out(hold, settings, storage, run_dir, trainers))
            with suppress(OSError):
                hold.stop_note.unlink()
            log.info("attempt %d of %s has ended", lease.number, lease.job_id)
        except LeaseLost:
            log.info("attempt %d of %s is dropped: the job moved on", lease.number, lease.job_id)
            _drop(lease)
        finally:
            clean(run_dir)


def _carry_out(hold: Hold, settings: Settings, storage: Storage, run_dir: Path, trainers: Trainers) -> LastDeed:
    try:
        needs = hold.write(lambda session: staging.needs_of(session, leases.held(session, hold.lease)))
        note = upload.insist(
            lambda: staging.lay_out(needs, run_dir, settings.models_dir, storage, hold.check),
            give_up=lambda: hold.lost or hold.stopping,
        )
        hold.check()
        if note:
            hold.write(lambda session: ledger.note(session, hold.lease.job_id, note, level="warn"))
        trainer = trainers.start(run_dir, hold.lease.gpu_indexes)
        scribe = Scribe(hold, settings, storage, run_dir, keep=needs.run.public_checkpoints)
        trackers = Trackers(hold, settings, run_dir, trainers.mark, needs.tracked)
        status = _listen(hold, trainer, scribe, storage, trackers)
        return _conclude(hold, trainer, scribe, status, settings, storage)
    except LeaseLost:
        raise
    except Interrupted:
        return _let_go(hold, snapshot=None)
    except StorageFailed as error:
        log.exception("attempt %d of %s broke off", hold.lease.number, hold.lease.job_id)
        # A worker that stops has not the time to wait for storage, and the run is not to blame.
        return _let_go(hold, snapshot=None) if hold.stopping else _hand_back(hold, str(error), fault=None)
    except UNREACHABLE:  # only where the worker shuts down
        return _let_go(hold, snapshot=None)
    except Exception as error:  # our own part failed, not the run: storage, a full disk, a damaged object
        log.exception("attempt %d of %s broke off", hold.lease.number, hold.lease.job_id)
        return _hand_back(hold, _told(error))


def _listen(hold: Hold, trainer: Trainer, scribe: Scribe, storage: Storage, trackers: Trackers) -> int:
    """To the end of the trainer and its log; its exit status."""
    log_prefix = f"jobs/{hold.lease.job_id}/logs/{hold.lease.number:06d}"
    process = {"pid": trainer.pid, "mark": trackers.mark}
    hold.watch(trainer)
    try:
        with upload.LogShipper(storage, trainer.log_path, log_prefix), scribe, trackers:
            hold.write(lambda session: leases.record_process(session, hold.lease, process))
            trackers.start()
            for message in trainer.messages(every=_SILENCE):
                scribe.hear(message)
                trackers.hear(message)
            status = trainer.wait()
            hold.write(lambda session: leases.held(session, hold.lease))
            scribe.close()
            return status
    finally:
        trainer.kill()
        trainer.wait()


def _conclude(
    hold: Hold, trainer: Trainer, scribe: Scribe, status: int, settings: Settings, storage: Storage
) -> LastDeed:
    last = scribe.last_word
    if status == 0 and isinstance(last, wire.Finished):
        return _publish(hold, scribe, last, settings, storage)
    if isinstance(last, wire.Failed) and last.kind != "crashed":
        return _fail(hold, last, settings)
    if status == wire.EXIT_PAUSED or hold.stopping:
        return _let_go(hold, snapshot=_stored(scribe, last.path if isinstance(last, wire.Paused) else None))
    return _hand_back(hold, last.message if isinstance(last, wire.Failed) else _last_words(trainer, status))


def _stored(scribe: Scribe, path: str | None) -> str | None:
    """The snapshot's name once it is stored; None where that cannot be: an earlier one will have to do."""
    try:
        return str(scribe.store_snapshot(path)) if path else None
    except StorageFailed:
        log.exception("the state saved last is lost")
        return None


# --- the ends -----------------------------------------------------------------------------------------------------


def _publish(hold: Hold, scribe: Scribe, finished: wire.Finished, settings: Settings, storage: Storage) -> LastDeed:
    """Objects first, their manifest last; everything that tells of them in the one transaction that is returned."""
    scribe.announce_upload()
    out, prefix = scribe.run_dir / finished.path, f"{scribe.prefix}/model"
    listed = scribe.publish(finished.path, prefix, seconds=_WHOLE_RUN)
    table = upload.insist(
        lambda: storage.put_file(shelf.new_key(), out / "results.csv"), give_up=hold.must_leave, seconds=_WHOLE_RUN
    )
    return lambda session: _succeed(session, hold.lease, settings, finished, _Published(prefix, listed, table))


@dataclass(frozen=True)
class _Published:
    """What lies in storage and is not yet told of."""

    prefix: str
    listed: Manifest
    table: Stored


def _succeed(
    session: Session, lease: Lease, settings: Settings, finished: wire.Finished, published: _Published
) -> None:
    job = leases.held(session, lease)
    model = add_model(session, job, settings, prefix=published.prefix, listed=published.listed)
    if not job.withholds_model:
        registry.publish(session, job.id)  # its checkpoints, which waited for the gate
    file = shelf.shelve(session, job.project_id, published.table, purpose=shelf.RESULTS, filename=RESULTS)
    quoting.conclude(session, job, lease, finished, settings)
    leases.finish(
        session,
        lease,
        tuned_model=model.id,
        trained_tokens=finished.trained_tokens,
        result_file=file.id,
        progress={**job.progress, **finished.model_dump(mode="json", exclude=_NO_PROGRESS)},
    )


def _fail(hold: Hold, failed: wire.Failed, settings: Settings) -> LastDeed:
    error = JobFailure.quoted(failed.code, failed.message, failed.param)

    def deed(session: Session) -> None:
        quoting.conclude(session, leases.held(session, hold.lease), hold.lease, None, settings)
        leases.fail(session, hold.lease, error, outcome=failed.kind)

    return deed


def _let_go(hold: Hold, *, snapshot: str | None) -> LastDeed:
    """The owner's pause, or this worker's end. Which of them, the row says: a pause may have been taken back."""
    reason = "The worker is being stopped" if hold.draining else "The run was stopped"

    def deed(session: Session) -> None:
        if leases.held(session, hold.lease).wish == "pause":
            leases.park(session, hold.lease, snapshot=snapshot)
        else:
            leases.requeue(session, hold.lease, reason=reason, outcome="preempted", snapshot=snapshot)

    return deed


def _hand_back(hold: Hold, reason: str, fault: leases.Fault | None = "crashed") -> LastDeed:
    """Back to the queue. `fault` None: storage was away, which is not the run's to answer for."""
    error = TrainingCrashed(reason=reason, job=hold.lease.job_id)
    return lambda session: leases.requeue(
        session, hold.lease, reason=f"Training broke off: {reason}", outcome="crashed", fault=fault, error=error
    )


def _told(error: Exception) -> str:
    """What the job's owner may read. The text of an error that is not ours is for the log: it may hold SQL or paths."""
    if isinstance(error, TuneryError):
        return str(error)
    return f"the worker met {type(error).__name__}, which its operator finds in the worker's log."


def _last_words(trainer: Trainer, status: int) -> str:
    cause = f"the trainer exited with status {status}"
    if status < 0:
        cause = f"the trainer was killed by signal {-status}"
    if status == -signal.SIGKILL:
        cause += " (the host may have run out of memory)"
    return f"{cause}; its log ends with: {trainer.last_words() or '(nothing)'}"


def _drop(lease: Lease) -> None:
    """The process is gone, so its devices are free. What it stored and no row tells of, the sweeper removes once the
    job has ended; again, if it had ended and been tidied before we knew."""
    try:
        with db.transaction() as session:
            leases.end_attempt(session, lease, "dropped")
            session.execute(update(Job).where(Job.id == lease.job_id).values(tidied=False))
    except UNREACHABLE as error:
        log.warning("attempt %d of %s was not given back: %s", lease.number, lease.job_id, error)


def clean(run_dir: Path) -> None:
    """Removes a run directory whose attempt has ended, but for its log: storage may not have got the end of it."""
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if path.name == "log.txt":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
