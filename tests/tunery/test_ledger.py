"""Jobs change state only along TRANSITIONS, and only the holder of a job's lease may write."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import rows
from cloned_databases import Database
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunery import db
from tunery.errors import InvalidValue, NotFound, WrongState
from tunery.failures import InvalidTrainingFile, TrainingCrashed
from tunery.jobs import leases, ledger
from tunery.jobs.errors import IllegalMove, LeaseLost, QuotaExceeded
from tunery.jobs.model import Attempt, Checkpoint, Job, JobEvent, Metric
from tunery.jobs.states import FINAL, TRANSITIONS, State

PAIRS = list(itertools.product(State, State))


@pytest.fixture
def running(session: Session) -> tuple[Job, leases.Lease]:
    job = rows.job(session, state=State.QUEUED)
    lease = rows.claim(session)
    assert lease is not None
    session.refresh(job)
    return job, lease


def _messages(session: Session, job: Job) -> list[str]:
    return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)))


def test_every_pair_of_states_is_an_edge_or_refused(session: Session) -> None:
    for source, target in PAIRS:
        job = rows.job(session, state=source)
        values = rows.final_values(session, job, target) | {"plan": rows.plan().model_dump(mode="json")}
        if target in TRANSITIONS[source]:
            ledger.move(session, job, target, message="moved", **values)
            assert job.state == target
        else:
            with pytest.raises(IllegalMove):
                ledger.move(session, job, target, message="moved", **values)
            session.refresh(job)
            assert job.state == source


@pytest.mark.parametrize("target", sorted(TRANSITIONS[State.RUNNING]))
def test_no_job_says_when_it_ends_once_it_has_stopped_running(session: Session, target: State) -> None:
    job = rows.job(session, state=State.RUNNING)
    job.estimated_finish = rows.LONG_AGO
    session.flush()
    ledger.move(session, job, target, message="moved", **rows.final_values(session, job, target))
    assert job.estimated_finish is None


@pytest.mark.parametrize("state", list(State))
def test_final_and_finished_go_together_in_the_database_itself(session: Session, state: State) -> None:
    job = rows.job(session, state=state)
    session.flush()
    contradiction = None if state in FINAL else func.now()
    with pytest.raises(IntegrityError, match="final_is_finished"):
        session.execute(update(Job).where(Job.id == job.id).values(finished_at=contradiction))


def test_a_second_live_attempt_is_refused_by_the_database(session: Session, running: tuple[Job, leases.Lease]) -> None:
    job, _ = running
    twin = Attempt(job_id=job.id, number=99, host="h", slot="s", gpu_indexes=[], lease_until=func.now())
    session.add(twin)
    with pytest.raises(IntegrityError, match="uq_attempts_live"):
        session.flush()


def test_the_story_of_a_good_job(session: Session, running: tuple[Job, leases.Lease]) -> None:
    job, lease = running
    leases.record_metrics(session, lease, {1: {"train_loss": 2.0}, 2: {"train_loss": 1.0}})
    leases.record_metrics(session, lease, {2: {"full_valid_loss": 1.5}})
    model = rows.tuned(session, job)
    result = rows.file(session, session.get_one(rows.Project, job.project_id), purpose="fine-tune-results")
    leases.finish(session, lease, tuned_model=model.id, trained_tokens=7, result_file=result.id, progress={})
    assert _messages(session, job) == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        f"New fine-tuned model created: {model.id}",
        "The job has successfully completed",
    ]
    assert session.scalars(select(Metric.values).order_by(Metric.step)).all() == [
        {"train_loss": 2.0},
        {"train_loss": 1.0, "full_valid_loss": 1.5},
    ]
    assert (job.state, job.trained_tokens) == ("succeeded", 7)
    assert job.finished_at is not None
    outcomes = session.scalars(select(JobEvent.outcome).where(JobEvent.outcome.is_not(None))).all()
    assert outcomes == ["succeeded"]


@pytest.mark.parametrize("action", ["renew", "metrics", "progress", "checkpoint", "finish", "fail", "park", "requeue"])
def test_after_a_cancel_the_worker_writes_nothing(
    session: Session, running: tuple[Job, leases.Lease], action: str
) -> None:
    job, lease = running
    ledger.cancel(session, job.project_id, job.id)
    story, model = _messages(session, job), rows.tuned(session, job)
    actions = {
        "renew": lambda: leases.renew(session, lease, lease_seconds=600),
        "metrics": lambda: leases.record_metrics(session, lease, {1: {"train_loss": 1.0}}),
        "progress": lambda: leases.record_progress(session, lease, step=5),
        "checkpoint": lambda: leases.record_checkpoint(session, lease, step=1, model_id=model.id, metrics={}),
        "finish": lambda: leases.finish(
            session, lease, tuned_model="x", trained_tokens=1, result_file="x", progress={}
        ),
        "fail": lambda: leases.fail(session, lease, InvalidTrainingFile(role="training", reason="")),
        "park": lambda: leases.park(session, lease, snapshot=None),
        "requeue": lambda: leases.requeue(session, lease, reason="r", outcome="o", fault="crashed"),
    }
    with pytest.raises(LeaseLost):
        actions[action]()
    session.refresh(job)
    assert (job.state, job.step) == ("cancelled", 0)
    assert session.scalar(select(func.count()).select_from(Metric)) == 0
    assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0
    assert _messages(session, job) == story


def test_a_cancelled_jobs_devices_stay_taken_until_its_process_is_gone(session: Session) -> None:
    first = rows.job(session, state=State.QUEUED)
    lease = rows.claim(session, gpus=(0,))
    assert lease
    assert lease.gpu_indexes == (0,)
    rows.job(session, state=State.QUEUED)
    ledger.cancel(session, first.project_id, first.id)
    assert rows.claim(session, "host/gpu0", gpus=(0,)) is None
    leases.end_attempt(session, lease, "cancelled")
    assert rows.claim(session, "host/gpu0", gpus=(0,)) is not None


def test_an_expired_lease_goes_back_to_the_queue_and_fences_the_old_hand_out(
    session: Session, running: tuple[Job, leases.Lease]
) -> None:
    job, lease = running
    assert leases.expire_leases(session) == 0
    session.execute(update(Attempt).values(lease_until=rows.LONG_AGO))
    assert leases.expire_leases(session) == 1
    session.refresh(job)
    assert (job.state, job.failures, job.losses) == ("queued", 0, 1)
    successor = rows.claim(session)
    assert successor
    assert successor.number > lease.number
    with pytest.raises(LeaseLost):
        leases.renew(session, lease, lease_seconds=600)
    with pytest.raises(LeaseLost):
        leases.finish(session, lease, tuned_model="x", trained_tokens=1, result_file="x", progress={})
    assert leases.renew(session, successor, lease_seconds=600) is None


@pytest.mark.usefixtures("database")
def test_a_lease_that_somebody_is_at_holds_no_other_up() -> None:
    with db.transaction() as session:
        for _ in range(2):
            rows.job(session, state=State.QUEUED)
            assert rows.claim(session)
        session.execute(update(Attempt).values(lease_until=rows.LONG_AGO))
        first = session.scalars(select(Attempt.id).order_by(Attempt.id)).first()
    with db.transaction() as stuck, db.transaction() as session:
        stuck.execute(select(Attempt).where(Attempt.id == first).with_for_update())
        session.execute(select(func.set_config("lock_timeout", "10s", True)))
        assert leases.expire_leases(session) == 1
    with db.transaction() as session:
        assert leases.expire_leases(session) == 1


def test_a_late_renewal_revives_a_lease_that_nobody_reaped(session: Session, running: tuple[Job, leases.Lease]) -> None:
    _, lease = running
    session.execute(update(Attempt).values(lease_until=rows.LONG_AGO))
    leases.renew(session, lease, lease_seconds=600)
    assert leases.expire_leases(session) == 0


def test_three_lost_attempts_fail_the_job(session: Session) -> None:
    job = rows.job(session, state=State.QUEUED)
    for _ in range(leases.MAX_FAILURES):
        session.refresh(job)
        assert job.state == "queued"
        assert rows.claim(session)
        session.execute(update(Attempt).where(Attempt.ended_at.is_(None)).values(lease_until=rows.LONG_AGO))
        leases.expire_leases(session)
    session.refresh(job)
    assert (job.state, job.error_code) == ("failed", "worker_lost")
    assert "lost 3 time(s) since it was created" in str(job.error_message)


def _lose(session: Session) -> None:
    session.execute(update(Attempt).where(Attempt.ended_at.is_(None)).values(lease_until=rows.LONG_AGO))
    assert leases.expire_leases(session) == 1


def _crash(session: Session, lease: leases.Lease) -> None:
    error = TrainingCrashed(reason="r", job="j")
    leases.requeue(session, lease, reason="r", outcome="crashed", fault="crashed", error=error)


def test_crashes_losses_and_outages_are_counted_apart(session: Session) -> None:
    job = rows.job(session, state=State.QUEUED)
    for end in ("crash", "lose", "outage", "lose", "outage", "crash", "outage"):
        lease = rows.claim(session)
        assert lease, end
        if end == "crash":
            _crash(session, lease)
        elif end == "lose":
            _lose(session)
        else:
            leases.requeue(session, lease, reason="Storage was away", outcome="crashed")
    session.refresh(job)
    assert (job.state, job.failures, job.losses) == ("queued", 2, 2)
    lease = rows.claim(session)
    assert lease
    _crash(session, lease)
    session.refresh(job)
    assert (job.state, job.error_code) == ("failed", "training_crashed")


def test_what_went_wrong_before_a_later_snapshot_is_not_counted(session: Session) -> None:
    job = rows.job(session, state=State.QUEUED)
    for step in range(1, 6):
        for end in (_crash, None, _crash):
            lease = rows.claim(session)
            assert lease, (step, end)
            if end is None:
                _lose(session)
            else:
                end(session, lease)
        lease = rows.claim(session)
        assert lease
        assert leases.record_snapshot(session, lease, f"s{step}", step=step) == (f"s{step - 1}" if step > 1 else None)
        leases.requeue(session, lease, reason="Shutdown", outcome="preempted")
    session.refresh(job)
    assert (job.failures, job.losses, job.snapshot, job.snapshot_step) == (0, 0, "s5", 5)


def test_a_snapshot_of_the_same_step_is_no_progress(session: Session) -> None:
    job = rows.job(session, state=State.QUEUED)
    for _ in range(leases.MAX_FAILURES):
        lease = rows.claim(session)
        assert lease
        leases.record_snapshot(session, lease, "s", step=7)
        _lose(session)
    session.refresh(job)
    assert job.state == "failed"
    assert "lost 3 time(s) since its state of step 7 was stored" in str(job.error_message)


def test_an_attempt_that_was_stopped_while_the_database_was_away_is_not_charged(session: Session) -> None:
    stopped, lost = rows.job(session, state=State.QUEUED), rows.job(session, state=State.QUEUED)
    first, _ = rows.claim(session, "host/a"), rows.claim(session, "host/a")
    assert first
    assert leases.reap_slot(session, "host/a", stopped={(first.job_id, first.number), (lost.id, 99)}) == 2
    outcomes = dict(session.execute(select(Attempt.job_id, Attempt.outcome)).all())
    assert outcomes == {stopped.id: "preempted", lost.id: "lost"}
    for job in (stopped, lost):
        session.refresh(job)
    assert (stopped.state, stopped.losses, lost.state, lost.losses) == ("queued", 0, "queued", 1)
    assert "The worker stopped while the database was unreachable" in _messages(session, stopped)[-1]


def test_a_preempted_attempt_is_not_counted(session: Session, running: tuple[Job, leases.Lease]) -> None:
    job, lease = running
    leases.requeue(session, lease, reason="Shutdown", outcome="preempted", snapshot="jobs/x/snap")
    session.refresh(job)
    assert (job.state, job.failures, job.snapshot) == ("queued", 0, "jobs/x/snap")


def test_pause_while_running_is_a_wish_until_the_save_is_done(
    session: Session, running: tuple[Job, leases.Lease]
) -> None:
    job, lease = running
    ledger.pause(session, job.project_id, job.id)
    assert (job.state, job.pause_requested) == ("running", "pause")
    assert leases.renew(session, lease, lease_seconds=600) == "pause"
    leases.park(session, lease, snapshot="jobs/x/snap")
    session.refresh(job)
    assert (job.state, job.pause_requested) == ("paused", None)
    ledger.resume(session, job.project_id, job.id)
    assert job.state == "queued"


@pytest.mark.parametrize("state", sorted(FINAL))
def test_an_ended_job_cannot_be_cancelled_paused_or_resumed(session: Session, state: State) -> None:
    job = rows.job(session, state=state)
    for action in (ledger.cancel, ledger.pause, ledger.resume):
        with pytest.raises(WrongState):
            action(session, job.project_id, job.id)


def test_another_projects_job_is_not_found(session: Session) -> None:
    job, other = rows.job(session), rows.project(session)
    for action in (ledger.cancel, ledger.pause, ledger.resume, ledger.find):
        with pytest.raises(NotFound):
            action(session, other.id, job.id)


def test_claims_go_by_priority_then_fair_share_then_age(session: Session) -> None:
    busy, calm = rows.project(session), rows.project(session)
    first, second = (rows.job(session, busy, State.QUEUED) for _ in range(2))
    third = rows.job(session, calm, State.QUEUED)
    urgent = rows.job(session, busy, State.QUEUED, priority=5)
    order = [lease.job_id for lease in iter(lambda: rows.claim(session), None)]
    assert order == [urgent.id, third.id, first.id, second.id]


def test_a_projects_cap_holds_and_does_not_hold_others_up(session: Session) -> None:
    capped, free = rows.project(session, max_running=1), rows.project(session)
    mine = [rows.job(session, capped, State.QUEUED) for _ in range(3)]
    theirs = rows.job(session, free, State.QUEUED)
    claimed = [lease.job_id for lease in iter(lambda: rows.claim(session), None)]
    assert claimed == [mine[0].id, theirs.id]


@pytest.mark.parametrize("shared", ["project", "gpu"])
def test_a_claim_waits_for_one_that_is_not_committed_yet(database: Database, shared: str) -> None:
    """Each alone would be right; together they would exceed the project's cap, or share GPU 0."""
    with db.transaction() as session:
        one = rows.project(session, max_running=1)
        for size, owner in ((2, one), (1, one if shared == "project" else rows.project(session))):
            ledger.enqueue(session, rows.job(session, owner, priority=size), rows.plan(resources={"gpus": size}))

    def second_claim() -> leases.Lease | None:
        with db.transaction() as session:
            return rows.claim(session, "host/b", (2,) if shared == "project" else (0,))

    with ThreadPoolExecutor(1) as pool:
        with db.transaction() as session:
            assert rows.claim(session, "host/a", (0, 1))
            second = pool.submit(second_claim)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
        assert second.result() is None


def test_a_job_waits_for_as_many_gpus_as_it_asks_for(session: Session) -> None:
    job = rows.job(session)
    ledger.enqueue(session, job, rows.plan(resources={"gpus": 2}))
    assert rows.claim(session, gpus=(0,)) is None
    lease = rows.claim(session, gpus=(0, 1, 2))
    assert lease
    assert lease.gpu_indexes == (0, 1)


def test_a_retried_create_finds_the_first_job(session: Session) -> None:
    owner = rows.project(session)
    job = rows.job(session, owner, request_sha256="same")

    def earlier(**changes: object) -> Job | None:
        asked = {"idempotency_key": None, "request_sha256": "same", "is_retry": True} | changes
        return ledger.earlier_request(session, owner.id, **asked)  # type: ignore[arg-type]

    assert earlier() is job
    assert earlier(is_retry=False) is None
    assert earlier(request_sha256="other") is None
    session.execute(update(Job).values(created_at=func.now() - ledger.RETRY_WINDOW * 2))
    assert earlier() is None


def test_an_idempotency_key_names_one_request(session: Session) -> None:
    owner = rows.project(session)
    job = rows.job(session, owner, request_sha256="same", idempotency_key="k1")
    ask = {"idempotency_key": "k1", "is_retry": False}
    assert ledger.earlier_request(session, owner.id, request_sha256="same", **ask) is job
    assert ledger.earlier_request(session, rows.project(session).id, request_sha256="same", **ask) is None
    with pytest.raises(InvalidValue, match="for a different request"):
        ledger.earlier_request(session, owner.id, request_sha256="other", **ask)


def test_a_project_may_not_queue_more_than_its_quota(session: Session) -> None:
    owner = rows.project(session, max_queued=1)
    rows.job(session, owner)
    with pytest.raises(QuotaExceeded):
        rows.job(session, owner)


def test_a_file_of_a_live_job_is_in_use(session: Session) -> None:
    job = rows.job(session)
    assert ledger.live_job_using(session, job.training_file) == job.id
    ledger.cancel(session, job.project_id, job.id)
    assert ledger.live_job_using(session, job.training_file) is None


def test_a_returning_worker_reaps_its_own_slot_only(session: Session) -> None:
    mine, theirs = rows.job(session, state=State.QUEUED), rows.job(session, state=State.QUEUED)
    assert rows.claim(session, "host/a")
    assert rows.claim(session, "host/b")
    assert leases.reap_slot(session, "host/a") == 1
    session.refresh(mine)
    session.refresh(theirs)
    assert {mine.state, theirs.state} == {"queued", "running"}


def test_a_worker_of_the_previous_release_shows_its_devices_as_before(session: Session) -> None:
    """It upserts and reads `slots`, which is now a view of `devices`."""
    shown = text(
        "INSERT INTO slots (id, host, device, memory_bytes, bf16) VALUES ('h/cpu', 'h', 'CPU', :memory, true) "
        "ON CONFLICT (id) DO UPDATE SET memory_bytes = excluded.memory_bytes, seen_at = clock_timestamp()"
    )
    for memory in (8, 16):
        session.execute(shown, {"memory": memory})

    [device] = leases.devices(session)
    assert (device.id, device.gpu_index, device.memory_bytes) == ("h/cpu", None, 16)
    assert session.scalars(text("SELECT memory_bytes FROM slots")).all() == [16]
