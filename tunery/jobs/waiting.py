"""Says why jobs have not started yet, as the end of a sentence "it waits for ..."."""

from collections.abc import Iterable, Sequence

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from tunery.datasets.model import File
from tunery.jobs import leases
from tunery.jobs.model import Attempt, HostDevice, Job
from tunery.jobs.states import State
from tunery.keys.model import Project
from tunery.planning.memory import gib


def reasons(session: Session, jobs: Iterable[Job]) -> dict[str, str]:
    """Returns what each waiting job waits for, by its id."""
    waiting = [job for job in jobs if job.state in (State.VALIDATING, State.QUEUED)]
    if not waiting:
        return {}
    devices = leases.devices(session)
    return {
        job.id: _files(session, job) if job.state == State.VALIDATING else _device(session, job, devices)
        for job in waiting
    }


def _files(session: Session, job: Job) -> str:
    named = [job.training_file, job.validation_file, job.test_file, job.replay_file]
    unread = session.scalars(select(File.id).where(File.id.in_(named), File.status == "uploaded").order_by(File.id))
    if found := list(unread):
        return f"a worker to check {' and '.join(found)}"
    return "a worker to read its files"


def _device(session: Session, job: Job, devices: Sequence[HostDevice]) -> str:
    """Returns the first unmet condition of the queue, from the hardest to change to the easiest."""
    missing = lack(devices, gpus=job.gpus, gpu_bytes=job.gpu_bytes, cpu_bytes=job.cpu_bytes)
    if missing is not None:
        return missing
    live = _live(session, Attempt.job_id == job.id)
    if live:
        return "its last attempt to end"
    most = session.get_one(Project, job.project_id).max_running
    if most is not None and _live(session, Job.project_id == job.project_id) >= most:
        return f"another job of its project to end: {most} may run at a time"
    return f"{_wanted(job)} to become free; jobs with a higher priority, or older ones, go first"


def _live(session: Session, whose: ColumnElement[bool]) -> int:
    query = select(func.count()).select_from(Attempt).join(Job, Job.id == Attempt.job_id)
    return session.scalar(query.where(Attempt.ended_at.is_(None), whose)) or 0


def _wanted(job: Job) -> str:
    return f"{job.gpus} GPUs of one host" if job.gpus > 1 else "a device with enough memory"


def lack(devices: Sequence[HostDevice], *, gpus: int, gpu_bytes: int, cpu_bytes: int | None) -> str | None:
    """Returns what every host lacks for a job, or None where one could take it.

    `gpu_bytes` is what it needs on each GPU, `cpu_bytes` on a host without one: None if it must not run on a CPU.
    """
    if not devices:
        return "a training worker: none has connected within the last hour"
    cards = [device for device in devices if device.gpu_index is not None]
    large = [card.host for card in cards if card.memory_bytes >= gpu_bytes]
    if max((large.count(host) for host in large), default=0) >= gpus or _fits_a_cpu(devices, gpus, cpu_bytes):
        return None
    if gpus > 1:
        hosts = [card.host for card in cards]
        most = max((hosts.count(host) for host in hosts), default=0)
        has = str(most or "none") if most < gpus else f"{most}, not all of them with that memory"
        memory = f" with {gib(gpu_bytes)} of memory each" if most >= gpus else ""
        return f"{gpus} GPUs of one host{memory}; the largest worker has {has}"
    largest = max((card.memory_bytes for card in cards), default=0)
    has = f"the largest here has {gib(largest)}" if cards else "no worker here has one"
    return f"a GPU with {gib(gpu_bytes)} of memory; {has}"


def _fits_a_cpu(devices: Sequence[HostDevice], gpus: int, cpu_bytes: int | None) -> bool:
    hosts = (device.memory_bytes for device in devices if device.gpu_index is None)
    return gpus == 1 and cpu_bytes is not None and any(size >= cpu_bytes for size in hosts)
