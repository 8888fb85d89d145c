"""A worker's operations on a job that it has claimed: renewals, progress and the end of its attempt.

A lease is the right to one attempt. If the job has been cancelled or taken over by another worker, every operation
raises LeaseLost and writes nothing. Callers own the transaction.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import dispatch, ids
from tunery.errors import TuneryError
from tunery.failures import WorkerLost
from tunery.jobs import ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.model import Attempt, Checkpoint, HostDevice, Job, Metric
from tunery.jobs.states import State

MAX_FAILURES = 3
"""Crashes, and separately lost workers, without a new snapshot between them, after which the job fails."""

Fault = Literal["crashed", "lost"]
"""How an attempt's end counts against the job. Outages of the service itself do not count."""


@dataclass(frozen=True)
class Lease:
    """A worker's right to one attempt. `number` is the fencing token, checked at every write."""

    job_id: str
    attempt_id: int
    number: int
    gpu_indexes: tuple[int, ...]


def renew(session: Session, lease: Lease, *, lease_seconds: int, last_step: int = 0) -> str | None:
    """Renews the lease; returns `pause` if the job's owner asked for one, else None.

    A late renewal still succeeds if the attempt has not been ended. Raises LeaseLost if the job was cancelled or taken
    over.
    """
    renewed = session.execute(
        update(Attempt)
        .where(Attempt.id == lease.attempt_id, Attempt.ended_at.is_(None))
        .values(
            lease_until=func.clock_timestamp() + timedelta(seconds=lease_seconds),
            last_step=func.greatest(Attempt.last_step, last_step),
        )
        .returning(Attempt.id)
    ).one_or_none()
    job = session.get_one(Job, lease.job_id, populate_existing=True)
    if renewed is None or job.state != State.RUNNING or job.fence != lease.number:
        raise LeaseLost(job=lease.job_id, attempt=lease.number)
    return job.pause_requested


def held(session: Session, lease: Lease) -> Job:
    """Returns the lease's job, locked for this transaction. Raises LeaseLost if this attempt no longer owns it."""
    job = session.get_one(Job, lease.job_id, with_for_update=True, populate_existing=True)
    if job.state != State.RUNNING or job.fence != lease.number:
        raise LeaseLost(job=lease.job_id, attempt=lease.number)
    return job


def record_process(session: Session, lease: Lease, process: dict[str, Any]) -> None:
    """Records the trainer's process (pid, start time, process group), to be found if this worker dies."""
    session.execute(update(Attempt).where(Attempt.id == lease.attempt_id).values(process=process))


def record_progress(session: Session, lease: Lease, **values: Any) -> None:
    """Sets the job's progress columns (`phase`, `step`, `total_steps`, `progress`, ...). Raises LeaseLost."""
    job = held(session, lease)
    for name, value in values.items():
        setattr(job, name, value)
    session.flush()


def record_metrics(session: Session, lease: Lease, rows: Mapping[int, dict[str, Any]]) -> None:
    """Stores measurements by step; values of a repeated step overwrite the earlier ones. Raises LeaseLost."""
    held(session, lease)
    if not rows:
        return
    statement = insert(Metric).values([{"job_id": lease.job_id, "step": s, "values": v} for s, v in rows.items()])
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["job_id", "step"], set_={"values": Metric.values.concat(statement.excluded["values"])}
        )
    )


def record_snapshot(session: Session, lease: Lease, snapshot: str, *, step: int) -> str | None:
    """Sets the snapshot to resume from; returns the previous one. Raises LeaseLost.

    A later step than before is progress, and resets the counts of crashes and lost workers.
    """
    job = held(session, lease)
    if step > (job.snapshot_step or 0):
        job.failures = job.losses = 0
        job.snapshot_step = step
    former, job.snapshot = job.snapshot, snapshot
    session.flush()
    return former


def record_checkpoint(
    session: Session, lease: Lease, *, step: int, model_id: str, metrics: dict[str, Any]
) -> Checkpoint:
    """Adds and returns a public checkpoint, whose model row and objects are stored already. Raises LeaseLost."""
    held(session, lease)
    checkpoint = Checkpoint(
        id=ids.new(ids.CHECKPOINT), job_id=lease.job_id, step=step, model_id=model_id, metrics=metrics
    )
    session.add(checkpoint)
    session.flush()
    ledger.note(session, lease.job_id, f"Checkpoint created at step {step} with Snapshot ID: {model_id}")
    return checkpoint


def finish(
    session: Session, lease: Lease, *, tuned_model: str, trained_tokens: int, result_file: str, progress: dict[str, Any]
) -> Job:
    """Ends the job as succeeded, in the same transaction as the model's and artifacts' rows. Raises LeaseLost."""
    job = held(session, lease)
    ledger.note(
        session, job.id, f"{'Withheld' if job.withholds_model else 'New'} fine-tuned model created: {tuned_model}"
    )
    ledger.move(
        session,
        job,
        State.SUCCEEDED,
        message="The job has successfully completed",
        tuned_model=tuned_model,
        trained_tokens=trained_tokens,
        result_file=result_file,
        progress=progress,
    )
    end_attempt(session, lease, "succeeded")
    return job


def fail(session: Session, lease: Lease, error: TuneryError, *, outcome: str = "failed") -> None:
    """Fails the job: there is no further attempt. Raises LeaseLost."""
    ledger.fail_job(session, held(session, lease), error)
    end_attempt(session, lease, outcome)


def park(session: Session, lease: Lease, *, snapshot: str | None) -> None:
    """Pauses the job, whose state is saved, and frees its devices. Raises LeaseLost."""
    job = held(session, lease)
    ledger.move(session, job, State.PAUSED, message="The job is paused", snapshot=snapshot or job.snapshot)
    end_attempt(session, lease, "paused")


def requeue(
    session: Session,
    lease: Lease,
    *,
    reason: str,
    outcome: str,
    fault: Fault | None = None,
    snapshot: str | None = None,
    error: TuneryError | None = None,
) -> None:
    """Returns the job to the queue, to resume from its last snapshot if it has one. Raises LeaseLost.

    A `fault` counts towards MAX_FAILURES; the last one fails the job instead, with `error`, or WorkerLost without.
    """
    job = held(session, lease)
    _give_back(session, job, reason=reason, fault=fault, snapshot=snapshot, error=error)
    end_attempt(session, lease, outcome)


def _give_back(
    session: Session,
    job: Job,
    *,
    reason: str,
    fault: Fault | None,
    snapshot: str | None = None,
    error: TuneryError | None = None,
) -> None:
    job.failures += fault == "crashed"
    job.losses += fault == "lost"
    if fault is not None and max(job.failures, job.losses) >= MAX_FAILURES:
        ledger.fail_job(session, job, error or WorkerLost(times=job.losses, after=_after(job)))
        return
    values: dict[str, Any] = {"fence": job.fence + 1, "snapshot": snapshot or job.snapshot}
    if job.pause_requested == "pause":
        ledger.move(session, job, State.PAUSED, message=f"{reason}; the job is paused", **values)
    else:
        message = f"{reason}; the job is queued again"
        ledger.move(session, job, State.QUEUED, message=message, level="warn", queued_at=job.queued_at, **values)


def _after(job: Job) -> str:
    return f"since its state of step {job.snapshot_step} was stored" if job.snapshot_step else "since it was created"


def end_attempt(session: Session, lease: Lease, outcome: str) -> None:
    """Ends the attempt and frees its devices. Has no effect on an attempt that has ended."""
    session.execute(
        update(Attempt)
        .where(Attempt.id == lease.attempt_id, Attempt.ended_at.is_(None))
        .values(ended_at=func.clock_timestamp(), lease_until=None, outcome=outcome)
    )
    dispatch.nudge_after_commit(session, dispatch.TRAIN)


def expire_leases(session: Session) -> int:
    """Ends every attempt whose lease has expired, and returns their number. Its job returns to the queue, or fails.

    Attempts of cancelled jobs end too, so that their devices count as free again.
    """
    return _reap_where(session, Attempt.lease_until < func.clock_timestamp(), skip_locked=True)


def pardon(session: Session, *, seconds: float) -> int:
    """Extends every live lease to at least `seconds` from now, after an outage in which workers could not renew.

    Returns the number of extended leases.
    """
    until = func.clock_timestamp() + timedelta(seconds=seconds)
    pardoned = session.scalars(
        update(Attempt)
        .where(Attempt.ended_at.is_(None), Attempt.lease_until < until)
        .values(lease_until=until)
        .returning(Attempt.id)
        .execution_options(synchronize_session=False)
    )
    return len(pardoned.all())


def reap_slot(session: Session, slot: str, *, stopped: Collection[tuple[str, int]] = ()) -> int:
    """Ends the attempts that a slot left when it restarted; returns their number.

    `stopped`: job and number of attempts that stopped because the database was unreachable; these are no faults.
    """
    return _reap_where(session, Attempt.slot == slot, skip_locked=False, stopped=stopped)


def _reap_where(
    session: Session, condition: ColumnElement[bool], *, skip_locked: bool, stopped: Collection[tuple[str, int]] = ()
) -> int:
    """Ends the live attempts that meet a condition; returns their number. `skip_locked`: skips locked jobs."""
    dead = Attempt.ended_at.is_(None) & condition
    reaped = 0
    for attempt_id, job_id in session.execute(select(Attempt.id, Attempt.job_id).where(dead)).all():
        # Job first, then attempt: the order in which every other operation locks them.
        locked = select(Job).where(Job.id == job_id).with_for_update(skip_locked=skip_locked)
        job = session.scalar(locked.execution_options(populate_existing=True))
        lease = select(Attempt).where(Attempt.id == attempt_id, dead).with_for_update(skip_locked=skip_locked)
        attempt = session.scalar(lease)
        if job is None or attempt is None:
            continue
        was_stopped = (job.id, attempt.number) in stopped
        if job.state == State.RUNNING and job.fence == attempt.number:
            if was_stopped:
                _give_back(session, job, reason="The worker stopped while the database was unreachable", fault=None)
            else:
                _give_back(session, job, reason="The worker was lost", fault="lost")
        outcome = "preempted" if was_stopped else "lost"
        end_attempt(session, Lease(job.id, attempt.id, attempt.number, tuple(attempt.gpu_indexes)), outcome)
        reaped += 1
    return reaped


def show_device(session: Session, device: HostDevice) -> None:
    """Records that a worker offers a device now."""
    values: dict[str, Any] = {
        "host": device.host,
        "gpu_index": device.gpu_index,
        "device": device.device,
        "memory_bytes": device.memory_bytes,
        "bf16": device.bf16,
        "seen_at": func.clock_timestamp(),
    }
    session.execute(
        insert(HostDevice).values(id=device.id, **values).on_conflict_do_update(index_elements=["id"], set_=values)
    )


def withdraw_devices(session: Session, ids: Collection[str]) -> None:
    """Records that a worker which offered these devices was stopped. They stay known: it may be back in a minute."""
    stopped = update(HostDevice).where(HostDevice.id.in_(ids)).values(stopped_at=func.clock_timestamp())
    session.execute(stopped)


def devices(session: Session, *, fresh_seconds: float = 3600) -> list[HostDevice]:
    """Returns the devices that workers have offered within the last `fresh_seconds`."""
    fresh = func.clock_timestamp() - timedelta(seconds=fresh_seconds)
    return list(session.scalars(select(HostDevice).where(HostDevice.seen_at > fresh).order_by(HostDevice.id)))
