"""One attempt at a job, from its claim to the end of its lease.

    lay out the run directory -> spawn the trainer -> record its messages -> publish its model

Outcomes, by the final message and the exit status:

    exit 0 after Finished                the job succeeded
    Failed user_error, nan_loss, gpu_oom the job failed; trying again would end the same way
    exit 75, or killed after the grace   paused; or the worker is stopping: requeued, not counted
    anything else                        crashed: requeued, counted
    LeaseLost                            the job was cancelled or taken over: everything is dropped
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tunery import db, processes
from tunery import trainer_protocol as protocol
from tunery.artifacts.manifest import Manifest
from tunery.datasets import files
from tunery.db import UNREACHABLE
from tunery.errors import TuneryError
from tunery.failures import JobFailure, TrainingCrashed
from tunery.jobs import leases, ledger, quoting
from tunery.jobs.errors import LeaseLost
from tunery.jobs.leases import Lease
from tunery.jobs.model import Attempt, Job
from tunery.models import registry
from tunery.settings import Settings
from tunery.storage import Storage, Stored
from tunery.storage.errors import StorageFailed
from worker.supervisor import served, staging, upload
from worker.supervisor.drain import Drain
from worker.supervisor.lease import Interrupted, LeaseKeeper
from worker.supervisor.process import Trainer, Trainers
from worker.supervisor.run_recorder import RunRecorder, add_model
from worker.supervisor.trackers import Trackers

log = logging.getLogger(__name__)

RESULTS = "step_metrics.csv"
"""The result file's name, the same as OpenAI's."""
_SILENCE = 0.5
"""Seconds without a message after which pending batches are written."""

_WHOLE_RUN = 6 * 3600
"""Seconds for which a finished run waits for storage: repeating the run would take longer."""
_NO_PROGRESS = {"type", "path", "spent", "step_times"}

FinalWrite = Callable[[Session], None]
"""The transaction that ends the attempt."""


def run(lease: Lease, *, settings: Settings, storage: Storage, drain: Drain, trainers: Trainers) -> None:
    """Runs the attempt and ends its lease, however the run ends; see the module's docstring.

    Raises only if the database stays unreachable while the worker shuts down; the restarted slot then ends the lease.
    """
    run_dir = settings.runs_dir / lease.job_id / str(lease.number)
    log.info("attempt %d of %s begins in %s", lease.number, lease.job_id, run_dir)
    with LeaseKeeper(lease, settings, drain) as keeper:
        try:
            end = _carry_out(keeper, settings, storage, run_dir, trainers)
            outcome, state = keeper.write(lambda session: _end(session, lease, end))
            with suppress(OSError):
                keeper.stop_note.unlink()
            log.info("attempt %d of %s has ended: %s; the job is %s", lease.number, lease.job_id, outcome, state)
        except LeaseLost:
            log.info("attempt %d of %s is dropped: the job moved on", lease.number, lease.job_id)
            _drop(lease)
        finally:
            clean(run_dir)


def _end(session: Session, lease: Lease, end: FinalWrite) -> tuple[str | None, str]:
    """Ends the attempt, and returns its outcome and the job's state for the log."""
    end(session)
    session.flush()
    ended = select(Attempt.outcome).where(Attempt.job_id == lease.job_id, Attempt.number == lease.number)
    return session.scalar(ended), str(session.scalar(select(Job.state).where(Job.id == lease.job_id)))


def _carry_out(
    keeper: LeaseKeeper, settings: Settings, storage: Storage, run_dir: Path, trainers: Trainers
) -> FinalWrite:
    try:
        needs = keeper.write(lambda session: staging.needs_of(session, leases.held(session, keeper.lease)))
        note = upload.insist(
            lambda: staging.lay_out(needs, run_dir, settings.models_dir, storage, keeper.check),
            give_up=lambda: keeper.lost or keeper.stopping,
        )
        keeper.check()
        if note:
            keeper.write(lambda session: ledger.note(session, keeper.lease.job_id, note, level="warn"))
        trainer = trainers.start(run_dir, keeper.lease.gpu_indexes)
        recorder = RunRecorder(keeper, settings, storage, run_dir, keep=needs.run.public_checkpoints)
        trackers = Trackers(keeper, settings, run_dir, trainers.mark, needs.tracked)
        with served.Check(keeper, run_dir, settings, trainers.mark) as check:
            status = _listen(keeper, trainer, recorder, storage, trackers, check)
            return _conclude(keeper, trainer, recorder, status, settings, storage, check)
    except LeaseLost:
        raise
    except Interrupted:
        return _let_go(keeper, snapshot=None)
    except StorageFailed as error:
        log.exception("attempt %d of %s failed", keeper.lease.number, keeper.lease.job_id)
        # A worker that is stopping has no time to wait for storage, and the run is not to blame.
        return _let_go(keeper, snapshot=None) if keeper.stopping else _hand_back(keeper, str(error), fault=None)
    except UNREACHABLE:  # only where the worker shuts down
        return _let_go(keeper, snapshot=None)
    except Exception as error:  # not the run failed, but the worker: storage, a full disk, a damaged object
        log.exception("attempt %d of %s failed", keeper.lease.number, keeper.lease.job_id)
        return _hand_back(keeper, _public_reason(error))


def _listen(
    keeper: LeaseKeeper,
    trainer: Trainer,
    recorder: RunRecorder,
    storage: Storage,
    trackers: Trackers,
    check: served.Check,
) -> int:
    """Records the trainer's messages until it has ended and its log is stored; returns its exit status."""
    log_prefix = f"jobs/{keeper.lease.job_id}/logs/{keeper.lease.number:06d}"
    process = {"pid": trainer.pid, "mark": trackers.mark}
    keeper.watch(trainer)
    try:
        with upload.LogShipper(storage, trainer.log_path, log_prefix), recorder, trackers:
            keeper.write(lambda session: leases.record_process(session, keeper.lease, process))
            trackers.start()
            for message in trainer.messages(every=_SILENCE):
                recorder.record(message)
                trackers.record(message)
                check.make_ready()
            status = trainer.wait()
            keeper.write(lambda session: leases.held(session, keeper.lease))
            recorder.close()
            return status
    finally:
        trainer.kill()
        trainer.wait()


def _conclude(
    keeper: LeaseKeeper,
    trainer: Trainer,
    recorder: RunRecorder,
    status: int,
    settings: Settings,
    storage: Storage,
    check: served.Check,
) -> FinalWrite:
    last = recorder.final_message
    if status == 0 and isinstance(last, protocol.Finished):
        _check_served(keeper, recorder, check)
        return _publish(keeper, recorder, last, settings, storage)
    if isinstance(last, protocol.Failed) and last.kind != "crashed":
        return _fail(keeper, last, settings)
    if status == protocol.EXIT_PAUSED or keeper.stopping:
        if status != protocol.EXIT_PAUSED:
            how = _exit_reason(trainer, status)
            log.warning("attempt %d of %s saved nothing: %s", keeper.lease.number, keeper.lease.job_id, how)
        return _let_go(keeper, snapshot=_stored(recorder, last.path if isinstance(last, protocol.Paused) else None))
    return _hand_back(keeper, last.message if isinstance(last, protocol.Failed) else _exit_reason(trainer, status))


def _stored(recorder: RunRecorder, path: str | None) -> str | None:
    """Stores a snapshot and returns its name; None if that fails, and an earlier one is resumed from."""
    try:
        return str(recorder.store_snapshot(path)) if path else None
    except StorageFailed:
        log.exception("the last saved state could not be stored")
        return None


# --- outcomes ---------------------------------------------------------------------------------------------------


def _check_served(keeper: LeaseKeeper, recorder: RunRecorder, check: served.Check) -> None:
    """Records whether the model server's answers match the scorecard's; if they do not, the model may be withheld."""
    if check.is_due:
        recorder.announce("checking")
        found = check.run()
        keeper.write(lambda session: served.record(session, keeper.lease, found))


def _publish(
    keeper: LeaseKeeper, recorder: RunRecorder, finished: protocol.Finished, settings: Settings, storage: Storage
) -> FinalWrite:
    """Stores the model's objects, the manifest last, and returns the transaction that writes all rows about them."""
    recorder.announce("uploading")
    out, prefix = recorder.run_dir / finished.path, f"{recorder.prefix}/model"
    listed = recorder.publish(finished.path, prefix, seconds=_WHOLE_RUN)
    table = upload.insist(
        lambda: storage.put_file(files.new_key(), out / "results.csv"), give_up=keeper.must_leave, seconds=_WHOLE_RUN
    )
    return lambda session: _succeed(session, keeper.lease, settings, finished, _Published(prefix, listed, table))


@dataclass(frozen=True)
class _Published:
    """A model and its result file, both stored, without rows in the database yet."""

    prefix: str
    listed: Manifest
    table: Stored


def _succeed(
    session: Session, lease: Lease, settings: Settings, finished: protocol.Finished, published: _Published
) -> None:
    job = leases.held(session, lease)
    model = add_model(session, job, settings, prefix=published.prefix, listed=published.listed)
    if not job.withholds_model:
        registry.publish(session, job.id)  # the checkpoints, which waited for the gate
    file = files.create(session, job.project_id, published.table, purpose=files.RESULTS, filename=RESULTS)
    quoting.conclude(session, job, lease, finished, settings)
    leases.finish(
        session,
        lease,
        tuned_model=model.id,
        trained_tokens=finished.trained_tokens,
        result_file=file.id,
        progress={**job.progress, **finished.model_dump(mode="json", exclude=_NO_PROGRESS)},
    )


def _fail(keeper: LeaseKeeper, failed: protocol.Failed, settings: Settings) -> FinalWrite:
    error = JobFailure.quoted(failed.code, failed.message, failed.param)

    def write(session: Session) -> None:
        quoting.conclude(session, leases.held(session, keeper.lease), keeper.lease, None, settings)
        leases.fail(session, keeper.lease, error, outcome=failed.kind)

    return write


def _let_go(keeper: LeaseKeeper, *, snapshot: str | None) -> FinalWrite:
    """Pauses or requeues the job, as its row says: its owner may have withdrawn a pause."""
    reason = "The worker is shutting down" if keeper.draining else "The run was interrupted"

    def write(session: Session) -> None:
        if leases.held(session, keeper.lease).pause_requested == "pause":
            leases.park(session, keeper.lease, snapshot=snapshot)
        else:
            leases.requeue(session, keeper.lease, reason=reason, outcome="preempted", snapshot=snapshot)

    return write


def _hand_back(keeper: LeaseKeeper, reason: str, fault: leases.Fault | None = "crashed") -> FinalWrite:
    """Requeues the job after a crash. `fault` None: storage was unreachable, which does not count against the run."""
    error = TrainingCrashed(reason=reason, job=keeper.lease.job_id)
    return lambda session: leases.requeue(
        session, keeper.lease, reason=f"Training failed: {reason}", outcome="crashed", fault=fault, error=error
    )


def _public_reason(error: Exception) -> str:
    """Returns a reason that the job's owner may read. Other errors' texts, which hold SQL and paths, go to the log."""
    if isinstance(error, TuneryError):
        return str(error)
    return f"the worker failed with {type(error).__name__}. Ask the operator to read the worker's log."


def _exit_reason(trainer: Trainer, status: int) -> str:
    return f"the trainer {processes.ending(status)}; its log ends with: {trainer.log_tail() or '(nothing)'}"


def _drop(lease: Lease) -> None:
    """Ends an attempt whose lease was lost: its process has ended, so its devices are free.

    Once the job has ended, the sweeper removes what the attempt stored without a row, even if it has cleaned up before.
    """
    try:
        with db.transaction() as session:
            leases.end_attempt(session, lease, "dropped")
            session.execute(update(Job).where(Job.id == lease.job_id).values(storage_cleaned=False))
    except UNREACHABLE as error:
        log.warning("attempt %d of %s was not returned: %s", lease.number, lease.job_id, error)


def clean(run_dir: Path) -> None:
    """Removes the run directory of an ended attempt except its log, the end of which may not have reached storage."""
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if path.name == "log.txt":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
