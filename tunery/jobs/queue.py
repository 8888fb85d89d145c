"""The queue of jobs, which is their rows: chooses a worker's next job. Callers own the transaction."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from tunery import db
from tunery.jobs import ledger, quoting
from tunery.jobs.leases import Lease
from tunery.jobs.model import Attempt, Job
from tunery.jobs.states import State

CLAIM_LOCK = 7_214_001
"""Key of the advisory lock that serialises claims: with SKIP LOCKED alone a project could exceed its cap."""
AGED = timedelta(minutes=10)
"""Waiting time after which a host is reserved for a job."""
RESERVED_FOR = timedelta(minutes=5)
"""How long a reservation lasts after its host last asked for jobs."""

Devices = Mapping[int | None, int]
"""Bytes of memory by GPU index; under None those of the host, which then trains on its CPU."""


@dataclass(frozen=True)
class Offer:
    """What a worker's slot offers: all `devices` that it may use, and which of them are `idle`."""

    host: str
    slot: str
    devices: Devices
    idle: frozenset[int | None]


# Reads only each project's best job: 100,000 waiting jobs of one project cost as much as a single one.
_BEST = text(
    """
    WITH live AS (
        SELECT j.project_id, count(*) AS n FROM attempts a JOIN jobs j ON j.id = a.job_id
        WHERE a.ended_at IS NULL GROUP BY j.project_id
    )
    SELECT head.id
    FROM projects p
    LEFT JOIN live ON live.project_id = p.id
    CROSS JOIN LATERAL (
        SELECT j.id, j.priority, j.queued_at FROM jobs j
        WHERE j.project_id = p.id AND j.state = 'queued' AND j.id <> ALL (CAST(:passed AS text[]))
          AND j.gpus <= (
              SELECT count(*) FROM unnest(CAST(:devices AS bigint[])) AS device (bytes)
              WHERE device.bytes >= CASE WHEN :on_cpu THEN j.cpu_bytes ELSE j.gpu_bytes END
          )
          AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = j.id AND a.ended_at IS NULL)
        ORDER BY j.priority DESC, j.queued_at LIMIT 1
    ) head
    WHERE p.max_running IS NULL OR coalesce(live.n, 0) < p.max_running
    ORDER BY head.priority DESC, coalesce(live.n, 0), head.queued_at
    LIMIT 1
    """
)


def claim(session: Session, offer: Offer, *, lease_seconds: int) -> Lease | None:
    """Claims the best queued job that fits the memory of the offer's devices: by priority, then fewest live attempts of
    its project (caps respected), then age.

    Devices are counted under the same lock, so two slots of a host never take the same GPU. Returns None if no job
    fits, or if the free devices are reserved for a large job that has waited long.
    """
    session.execute(select(func.pg_advisory_xact_lock(CLAIM_LOCK)))
    free, ours = _devices(session, offer)
    if not free:
        return None
    job = _best(session, ours)
    if job is not None and _choose(job, free) is None:
        if _reserves(session, job, offer.host):
            return None
        job = _best(session, free)
    return None if job is None else _start(session, job, offer, free, lease_seconds)


def _devices(session: Session, offer: Offer) -> tuple[Devices, Devices]:
    """Returns the free devices, and the free ones with those that runs of ours occupy.

    GPUs that other programs use are in neither: they may never become free.
    """
    taken = session.scalars(
        select(func.unnest(Attempt.gpu_indexes)).where(Attempt.host == offer.host, Attempt.ended_at.is_(None))
    )
    busy = set(taken)
    free = {index: size for index, size in offer.devices.items() if index in offer.idle - busy}
    return free, {index: size for index, size in offer.devices.items() if index in offer.idle | busy}


def _best(session: Session, devices: Devices) -> Job | None:
    """Returns the head of the queue for these devices, locked. Skips locked jobs, as all other claims wait for this
    one."""
    passed: list[str] = []
    while True:
        asked = {"passed": passed, "devices": list(devices.values()), "on_cpu": None in devices}
        job_id = session.scalar(_BEST, asked)
        if job_id is None:
            return None
        query = select(Job).where(Job.id == job_id, Job.state == State.QUEUED).with_for_update(skip_locked=True)
        job = session.scalar(query.execution_options(populate_existing=True))
        if job is not None:
            return job
        passed.append(job_id)


def _choose(job: Job, free: Devices) -> tuple[int, ...] | None:
    """Returns the smallest GPUs that fit the job, so that large ones stay free; () is the CPU, None means too few."""
    need = job.cpu_bytes if None in free else job.gpu_bytes
    fitting = [index for index, size in sorted(free.items(), key=lambda item: item[1]) if size >= (need or 0)]
    if len(fitting) < job.gpus:
        return None
    return tuple(sorted(index for index in fitting[: job.gpus] if index is not None))


def _reserves(session: Session, job: Job, host: str) -> bool:
    """Reserves this host for a job that would fit it, so that smaller jobs leave it alone; returns whether it could.

    Only jobs older than AGED get a host, and only one. Each claim renews the reservation, so it expires if the host
    dies.
    """
    now = db.now(session)
    assert job.queued_at is not None, "it was found in the queue"
    if now - job.queued_at < AGED:
        return False
    if job.reserved_host not in (None, host) and job.reserved_until is not None and job.reserved_until > now:
        return False
    job.reserved_host, job.reserved_until = host, now + RESERVED_FOR
    session.flush()
    return True


def _start(session: Session, job: Job, offer: Offer, free: Devices, lease_seconds: int) -> Lease:
    number, gpus = job.fence + 1, _choose(job, free)
    assert gpus is not None, "the queue's head fits what is free"
    ledger.move(
        session,
        job,
        State.RUNNING,
        message="Fine-tuning job started",
        fence=number,
        phase="starting",
        reserved_host=None,
        reserved_until=None,
        estimated_finish=quoting.expected_finish(session, job),
    )
    attempt = Attempt(
        job_id=job.id,
        number=number,
        host=offer.host,
        slot=offer.slot,
        gpu_indexes=list(gpus),
        lease_until=func.clock_timestamp() + timedelta(seconds=lease_seconds),
    )
    session.add(attempt)
    session.flush()
    return Lease(job.id, attempt.id, number, gpus)
