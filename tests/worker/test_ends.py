"""Attempts that do not simply succeed: cancelled, paused, stopped or killed."""

import os
import signal
from typing import Any

import psutil
import pytest
from sqlalchemy import text
from workshop import Workshop, training_rows

from tunery.jobs import ledger

LONG: dict[str, Any] = {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}
"""600 steps of some ten milliseconds each on 12 rows: long enough to be interrupted."""


@pytest.fixture
def running(workshop: Workshop) -> tuple[Workshop, str]:
    """Returns the workshop with both workers, and a job that has made its first steps."""
    workshop.start("io")
    workshop.start("train")
    job_id = workshop.submit(workshop.file(training_rows(40)), **LONG)
    workshop.until_step(job_id, 1)
    return workshop, job_id


@pytest.mark.slow
def test_a_paused_job_resumes_where_it_stood_and_its_cancellation_kills_the_trainer(
    running: tuple[Workshop, str],
) -> None:
    workshop, job_id = running
    with workshop.session() as session:
        ledger.pause(session, workshop.project_id, job_id)
    paused = workshop.until_state(job_id, "paused")
    assert paused.snapshot
    assert workshop.trainers() == []

    with workshop.session() as session:
        ledger.resume(session, workshop.project_id, job_id)
    workshop.until_step(job_id, paused.step + 1)
    assert f"Resumed from step {_snapshot_step(paused.snapshot)}/2000" in workshop.story(job_id)
    (trainer,) = workshop.trainers()

    with workshop.session() as session:
        ledger.cancel(session, workshop.project_id, job_id)
    events = workshop.story(job_id)
    workshop.until(lambda: _is_dead(trainer), "the trainer is gone", seconds=15)
    workshop.until(lambda: workshop.attempts(job_id)[1].outcome, "the lease has ended", seconds=15)
    assert [attempt.outcome for attempt in workshop.attempts(job_id)] == ["paused", "dropped"]
    workshop.until(lambda: workshop.job(job_id).snapshot is None, "its snapshot is forgotten", seconds=15)
    assert list(workshop.storage.list(f"jobs/{job_id}/1/snapshots/")) == []
    assert workshop.story(job_id) == events


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["with a broker", "without one"])
def test_a_worker_that_is_asked_to_stop_saves_and_requeues(
    broker: str, workshop: Workshop, request: pytest.FixtureRequest
) -> None:
    if broker == "with a broker":  # then a wake-up starts the job, as no poll is due so soon
        request.getfixturevalue("valkey")
    polling = "60" if broker == "with a broker" else "0.5"
    workshop.start("io", TUNERY_POLL_SECONDS=polling)
    worker = workshop.start("train", TUNERY_POLL_SECONDS=polling)
    job_id = workshop.submit(workshop.file(training_rows(40)), **LONG)
    workshop.until_step(job_id, 1)

    worker.send_signal(signal.SIGTERM)
    job = workshop.until_state(job_id, "queued")
    assert worker.wait(30) == 0
    assert (job.failures, workshop.attempts(job_id)[0].outcome) == (0, "preempted")
    assert job.snapshot

    workshop.start("train")
    workshop.until(lambda: _resumed(workshop, job_id), "the run resumes from its snapshot")


@pytest.mark.slow
def test_a_killed_slot_leaves_no_trainer_and_its_job_goes_on(valkey: str, running: tuple[Workshop, str]) -> None:
    workshop, job_id = running
    slot, (trainer,) = workshop.slot_of(workshop.workers[1]), workshop.trainers()
    slot.kill()
    workshop.until(lambda: _is_dead(trainer), "no orphan", seconds=10)
    job = workshop.until(lambda: _with_losses(workshop, job_id, 1), "the lost attempt is counted")
    assert job.state in ("queued", "running")
    workshop.until(lambda: len(workshop.attempts(job_id)) == 2, "a new attempt")
    assert workshop.attempts(job_id)[0].outcome == "lost"


@pytest.mark.slow
def test_a_host_that_vanishes_loses_its_lease_and_another_worker_takes_over(running: tuple[Workshop, str]) -> None:
    workshop, job_id = running
    worker = workshop.workers[1]
    os.killpg(worker.pid, signal.SIGKILL)
    workshop.until(lambda: not workshop.trainers(), "no orphan", seconds=10)
    job = workshop.until_state(job_id, "queued")
    assert (job.losses, workshop.attempts(job_id)[0].outcome) == (1, "lost")
    workshop.start("train")
    workshop.until(lambda: len(workshop.attempts(job_id)) == 2, "another attempt")


@pytest.mark.slow
def test_a_worker_that_slept_beyond_its_lease_finds_its_job_taken_and_writes_nothing(
    running: tuple[Workshop, str],
) -> None:
    workshop, job_id = running
    slot, (trainer,) = workshop.slot_of(workshop.workers[1]), workshop.trainers()
    workshop.until(lambda: _suspended_between_transactions(workshop, slot), "a moment without an open transaction")
    workshop.until(lambda: workshop.attempts(job_id)[0].outcome == "lost", "its lease ran out")
    workshop.start("train", name="other")
    workshop.until(lambda: len(workshop.attempts(job_id)) == 2, "another worker took the job")
    workshop.until(lambda: len(workshop.trainers()) == 2, "both train for a while")
    slot.resume()
    workshop.until(lambda: _is_dead(trainer), "the late one killed its trainer", seconds=15)
    job = workshop.job(job_id)
    assert (job.state, job.fence) == ("running", workshop.attempts(job_id)[1].number)
    workshop.until_step(job_id, 2)


@pytest.mark.slow
def test_a_trainer_that_dies_again_and_again_fails_its_job_with_the_tail_of_its_log(workshop: Workshop) -> None:
    workshop.start("io")
    workshop.start("train")
    job_id = workshop.submit(workshop.file(training_rows(40)), **LONG)
    for number in range(1, 4):
        workshop.until(lambda: len(workshop.attempts(job_id)) == number, f"attempt {number}")  # noqa: B023
        workshop.until(workshop.trainers, "a trainer")[0].kill()
        workshop.until(lambda: workshop.attempts(job_id)[number - 1].outcome, "its end")  # noqa: B023
    job = workshop.until_state(job_id, "failed")
    assert job.error_code == "training_crashed"
    assert "killed by signal 9" in str(job.error_message)
    assert [attempt.outcome for attempt in workshop.attempts(job_id)] == ["crashed"] * 3


def _suspended_between_transactions(workshop: Workshop, slot: psutil.Process) -> bool:
    """Suspends a slot; returns whether it was outside a transaction, and resumes it if not.

    Inside one it would keep the job's row locked until PostgreSQL ends its connection.
    """
    slot.suspend()
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND pid <> pg_backend_pid()"
    with workshop.session() as session:
        free = bool(session.scalar(text(query)) == 0)
    if not free:
        slot.resume()
    return free


def _snapshot_step(snapshot: str) -> str:
    return snapshot.rpartition("@")[0].rpartition("step-")[2]


def _resumed(workshop: Workshop, job_id: str) -> bool:
    return any(line.startswith("Resumed from step") for line in workshop.story(job_id))


def _is_dead(found: psutil.Process) -> bool:
    try:
        return bool(found.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _with_losses(workshop: Workshop, job_id: str, losses: int) -> object:
    job = workshop.job(job_id)
    return job if job.losses == losses else None
