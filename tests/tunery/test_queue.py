"""Which job a slot gets: by the memory of its devices, skipping locked jobs, and in the end the large ones too."""

import pytest
import rows
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import db
from tunery.jobs import leases, ledger, queue
from tunery.jobs.leases import Lease
from tunery.jobs.model import Job
from tunery.jobs.queue import Devices, Offer
from tunery.jobs.states import State

GIB = 2**30
SMALL, LARGE = 24 * GIB, 80 * GIB


def queued(session: Session, *, gpus: int = 1, gpu_bytes: int = 0, cpu_bytes: int | None = None, **values: int) -> Job:
    job = rows.job(session, **values)
    ledger.enqueue(session, job, rows.plan(resources={"gpus": gpus}), gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes)
    return job


def claim(session: Session, devices: Devices, *, host: str = "host", busy: tuple[int, ...] = ()) -> Lease | None:
    offer = Offer(host, f"{host}/0", devices, frozenset(devices) - set(busy))
    return queue.claim(session, offer, lease_seconds=600)


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every job one that has waited for long."""
    monkeypatch.setattr(queue, "AGED", -queue.AGED)


def test_a_job_is_taken_only_by_cards_with_the_memory_for_it(session: Session) -> None:
    job = queued(session, gpu_bytes=SMALL + 1)
    assert claim(session, {0: SMALL}) is None
    lease = claim(session, {0: SMALL, 1: LARGE})
    assert lease
    assert (lease.job_id, lease.gpu_indexes) == (job.id, (1,))


def test_several_gpus_must_have_the_memory_each(session: Session) -> None:
    queued(session, gpus=2, gpu_bytes=SMALL + 1)
    assert claim(session, {0: SMALL, 1: LARGE}) is None
    lease = claim(session, {0: SMALL, 1: LARGE, 2: LARGE})
    assert lease
    assert lease.gpu_indexes == (1, 2)


def test_a_small_job_leaves_the_large_card_free(session: Session) -> None:
    queued(session, gpu_bytes=GIB)
    lease = claim(session, {0: LARGE, 1: SMALL})
    assert lease
    assert lease.gpu_indexes == (1,)


def test_a_cpu_takes_only_what_was_planned_for_it(session: Session) -> None:
    for_gpus, for_cpu = queued(session, gpu_bytes=GIB), queued(session, gpu_bytes=GIB, cpu_bytes=2 * GIB)
    assert claim(session, {None: GIB}) is None
    lease = claim(session, {None: 2 * GIB})
    assert lease
    assert (lease.job_id, lease.gpu_indexes) == (for_cpu.id, ())
    assert claim(session, {None: 2**50}) is None
    assert for_gpus.state == "queued"


def test_a_job_that_fits_nothing_free_is_passed_by_while_it_is_young(session: Session) -> None:
    queued(session, gpus=2)
    small = queued(session)
    lease = claim(session, {0: LARGE, 1: LARGE}, busy=(1,))
    assert lease
    assert lease.job_id == small.id


@pytest.mark.usefixtures("aged")
def test_a_host_takes_nothing_smaller_than_an_aged_job_that_it_can_hold(session: Session) -> None:
    running = queued(session)
    mine = claim(session, {0: LARGE, 1: LARGE})
    assert mine
    large, small = queued(session, gpus=2, priority=1), queued(session)
    assert claim(session, {0: LARGE, 1: LARGE}) is None
    elsewhere = claim(session, {0: LARGE, 1: LARGE}, host="other", busy=(1,))
    assert elsewhere
    assert elsewhere.job_id == small.id, "one host is kept free, not all"
    leases.end_attempt(session, mine, "done")
    lease = claim(session, {0: LARGE, 1: LARGE})
    assert lease
    assert (lease.job_id, lease.gpu_indexes) == (large.id, (0, 1))
    assert (running.state, large.reserved_host) == ("running", None)


@pytest.mark.usefixtures("aged")
def test_a_gpu_that_a_stranger_uses_keeps_no_host_free(session: Session) -> None:
    queued(session, gpus=2, priority=1)
    small = queued(session)
    lease = claim(session, {0: LARGE, 1: LARGE}, busy=(1,))
    assert lease
    assert lease.job_id == small.id


@pytest.mark.usefixtures("aged")
def test_the_reservation_of_a_host_that_is_gone_passes_to_another(session: Session) -> None:
    for _ in range(2):
        queued(session)
    assert claim(session, {0: LARGE, 1: LARGE})
    assert claim(session, {0: LARGE, 1: LARGE}, host="other")
    large, _ = queued(session, gpus=2, priority=1), queued(session)
    assert claim(session, {0: LARGE, 1: LARGE}) is None
    assert large.reserved_host == "host"
    large.reserved_until = rows.LONG_AGO
    assert claim(session, {0: LARGE, 1: LARGE}, host="other") is None
    assert large.reserved_host == "other"


@pytest.mark.usefixtures("database")
def test_a_job_that_somebody_is_at_holds_no_claim_up() -> None:
    with db.transaction() as session:
        first, second = rows.job(session, state=State.QUEUED, priority=1), rows.job(session, state=State.QUEUED)
    with db.transaction() as stuck, db.transaction() as session:
        stuck.execute(select(Job).where(Job.id == first.id).with_for_update())
        session.execute(select(func.set_config("lock_timeout", "10s", True)))
        lease = rows.claim(session)
        assert lease
        assert lease.job_id == second.id
    with db.transaction() as session:
        lease = rows.claim(session, "host/b")
        assert lease
        assert lease.job_id == first.id
