"""What a job waits for: the specific reason, found with the queue's own conditions."""

import pytest
import rows
from sqlalchemy.orm import Session

from tunery.jobs import leases, waiting
from tunery.jobs.model import HostDevice, Job
from tunery.jobs.states import State

GIB = 2**30
NOBODY = "a training worker: none has connected within the last hour"
NO_GPU = "2 GPUs of one host; the largest worker has none"
ONE_GPU = "2 GPUs of one host; the largest worker has 1"
SMALL = "a GPU with 20.0 GiB of memory; the largest here has 16.0 GiB"
SMALL_PAIR = (
    "2 GPUs of one host with 20.0 GiB of memory each; the largest worker has 2, not all of them with that memory"
)


def _device(host: str, gpu: int | None, memory: int) -> HostDevice:
    kind = "cpu" if gpu is None else "cuda"
    return HostDevice(id=f"{host}/{gpu}", host=host, gpu_index=gpu, device=kind, memory_bytes=memory, bf16=True)


def _queued(session: Session, *, gpus: int = 1, gpu_bytes: int = 0, cpu_bytes: int | None = 0, **caps: int) -> Job:
    job = rows.job(session, rows.project(session, **caps), State.QUEUED)
    job.gpus, job.gpu_bytes, job.cpu_bytes = gpus, gpu_bytes, cpu_bytes
    session.flush()
    return job


def _reason(session: Session, job: Job) -> str | None:
    return waiting.reasons(session, [job]).get(job.id)


@pytest.mark.parametrize(
    ("devices", "job", "reason"),
    [
        ([], {}, NOBODY),
        ([("a", None, 8)], {"gpus": 2}, NO_GPU),
        ([("a", 0, 80), ("b", 0, 80)], {"gpus": 2}, ONE_GPU),
        ([("a", 0, 16), ("a", 1, 80)], {"gpus": 2, "gpu_bytes": 20 * GIB}, SMALL_PAIR),
        ([("a", 0, 16)], {"gpu_bytes": 20 * GIB, "cpu_bytes": None}, SMALL),
        ([("a", None, 8)], {"gpu_bytes": 20 * GIB, "cpu_bytes": None}, "a GPU with 20.0 GiB of memory; no worker"),
        ([("a", None, 8)], {"cpu_bytes": 4 * GIB}, "a device with enough memory to become free"),
        ([("a", 0, 80), ("a", 1, 80)], {"gpus": 2}, "2 GPUs of one host to become free"),
        ([("a", None, 8)], {"max_running": 0}, "another job of its project to end: 0 may run at a time"),
    ],
)
def test_a_queued_job(
    session: Session, devices: list[tuple[str, int | None, int]], job: dict[str, int], reason: str
) -> None:
    for host, gpu, memory in devices:
        leases.show_device(session, _device(host, gpu, memory * GIB))
    found = _reason(session, _queued(session, **job))
    assert found is not None
    assert found.startswith(reason)


def test_a_job_whose_files_are_not_read(session: Session) -> None:
    job = rows.job(session)
    assert _reason(session, job) == "a worker to read its files"
    file = rows.file(session, rows.project(session), status="uploaded")
    job.training_file = file.id
    session.flush()
    assert _reason(session, job) == f"a worker to check {file.id}"


def test_a_job_that_does_not_wait(session: Session) -> None:
    states = (State.RUNNING, State.PAUSED, State.SUCCEEDED, State.FAILED, State.CANCELLED)
    assert waiting.reasons(session, [rows.job(session, state=state) for state in states]) == {}
