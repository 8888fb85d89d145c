"""Owners, workers and the sweeper act at random: the rows always agree with a model of a few lines."""

from dataclasses import dataclass, field

import pytest
import rows
from cloned_databases import Database
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from tunery.errors import WrongState
from tunery.failures import InvalidTrainingFile
from tunery.jobs import leases, ledger
from tunery.jobs.errors import LeaseLost
from tunery.jobs.model import Attempt, Job, JobEvent
from tunery.jobs.states import FINAL, State
from tunery.keys.model import Project

CAP = 2
SLOTS = ("host/0", "host/1", "host/2")


@dataclass
class Wanted:
    """The expected values of a job's row."""

    state: State = State.VALIDATING
    pause_requested: str | None = None
    failures: int = 0
    losses: int = 0
    holder: leases.Lease | None = None  # whose writes are accepted
    live: leases.Lease | None = None  # whose lease has not ended, although the job may have changed state


@dataclass
class Held:
    """A lease that some worker believes it holds."""

    lease: leases.Lease
    job: str
    slot: str


@dataclass
class World:
    jobs: dict[str, Wanted] = field(default_factory=dict)
    held: list[Held] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    """Runs each example in one transaction, rolled back at its end; the actions lock and flush as they always do."""

    sessions: sessionmaker[Session]

    @initialize()
    def begin(self) -> None:
        self.session = self.sessions()
        self.world = World()
        self.project = rows.project(self.session, max_running=CAP)
        # Hypothesis leaves some rules out of each example, so there must be something to do without them.
        for _ in range(3):
            self.world.jobs[rows.job(self.session, self.project, State.QUEUED).id] = Wanted(State.QUEUED)

    def teardown(self) -> None:
        self.session.close()

    # --- owners ---

    @rule()
    def submit(self) -> None:
        if len(self.world.jobs) < 5:
            self.world.jobs[rows.job(self.session, self.project).id] = Wanted()

    @rule(data=st.data())
    def validate(self, data: st.DataObject) -> None:
        job = ledger.next_to_validate(self.session)
        if job is None:
            assert all(wanted.state != State.VALIDATING for wanted in self.world.jobs.values())
        elif data.draw(st.booleans()):
            ledger.enqueue(self.session, job, rows.plan())
            self.world.jobs[job.id].state = State.QUEUED
        else:
            ledger.fail_job(self.session, job, InvalidTrainingFile(role="training", reason="x"))
            self.world.jobs[job.id].state = State.FAILED

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        for job_id, wanted in self._draw_job(data):
            if wanted.state in FINAL:
                with pytest.raises(WrongState):
                    ledger.cancel(self.session, self.project.id, job_id)
            else:
                ledger.cancel(self.session, self.project.id, job_id)
                wanted.state, wanted.pause_requested, wanted.holder = State.CANCELLED, None, None

    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        for job_id, wanted in self._draw_job(data):
            if wanted.state in FINAL or wanted.state == State.VALIDATING:
                with pytest.raises(WrongState):
                    ledger.pause(self.session, self.project.id, job_id)
                continue
            ledger.pause(self.session, self.project.id, job_id)
            if wanted.state == State.RUNNING:
                wanted.pause_requested = "pause"
            else:
                wanted.state = State.PAUSED

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        for job_id, wanted in self._draw_job(data):
            if wanted.state == State.PAUSED:
                ledger.resume(self.session, self.project.id, job_id)
                wanted.state = State.QUEUED
            elif wanted.pause_requested == "pause":
                ledger.resume(self.session, self.project.id, job_id)
                wanted.pause_requested = None
            else:
                with pytest.raises(WrongState):
                    ledger.resume(self.session, self.project.id, job_id)

    # --- workers ---

    @rule(slot=st.sampled_from(SLOTS))
    def claim(self, slot: str) -> None:
        lease = rows.claim(self.session, slot)
        free = [w for w in self.world.jobs.values() if w.state == State.QUEUED and w.live is None]
        live = sum(w.live is not None for w in self.world.jobs.values())
        assert (lease is not None) == (bool(free) and live < CAP)
        if lease is not None:
            wanted = self.world.jobs[lease.job_id]
            assert wanted in free
            wanted.state, wanted.holder, wanted.live = State.RUNNING, lease, lease
            self.world.held.append(Held(lease, lease.job_id, slot))

    @rule(
        data=st.data(),
        action=st.sampled_from(["renew", "progress", "metrics", "snapshot", "finish", "fail", "park", "requeue"]),
    )
    def speak(self, data: st.DataObject, action: str) -> None:
        """A worker acts. If it has lost its lease, the action must be refused and change nothing."""
        if not self.world.held:
            return
        held = data.draw(st.sampled_from(self.world.held))
        wanted = self.world.jobs[held.job]
        if wanted.holder != held.lease:
            before = self._events(held.job)
            with pytest.raises(LeaseLost):
                self._do(action, held.lease)
            assert self._events(held.job) == before
        else:
            self._do(action, held.lease)
            self._expect(action, wanted)

    def _do(self, action: str, lease: leases.Lease) -> None:
        session = self.session
        if action == "renew":
            leases.renew(session, lease, lease_seconds=600)
        elif action == "progress":
            leases.record_progress(session, lease, step=3)
        elif action == "metrics":
            leases.record_metrics(session, lease, {1: {"train_loss": 1.0}})
        elif action == "finish":
            job = leases.held(session, lease)
            result = rows.file(session, session.get_one(Project, job.project_id), purpose="fine-tune-results").id
            model = rows.tuned(session, job).id
            leases.finish(session, lease, tuned_model=model, trained_tokens=1, result_file=result, progress={})
        elif action == "fail":
            leases.fail(session, lease, InvalidTrainingFile(role="training", reason="x"))
        elif action == "park":
            leases.park(session, lease, snapshot=None)
        elif action == "snapshot":
            step = leases.held(session, lease).snapshot_step or 0
            leases.record_snapshot(session, lease, "jobs/x/snap", step=step + 1)
        else:
            leases.requeue(session, lease, reason="crashed", outcome="crashed", fault="crashed")

    def _expect(self, action: str, wanted: Wanted) -> None:
        ends = {"finish": State.SUCCEEDED, "fail": State.FAILED, "park": State.PAUSED}
        if action in ends:
            wanted.state, wanted.pause_requested, wanted.holder, wanted.live = ends[action], None, None, None
        elif action == "requeue":
            self._give_back(wanted)
        elif action == "snapshot":
            wanted.failures = wanted.losses = 0

    def _give_back(self, wanted: Wanted, *, is_lost: bool = False) -> None:
        wanted.losses += is_lost
        wanted.failures += not is_lost
        back = State.PAUSED if wanted.pause_requested else State.QUEUED
        spent = max(wanted.failures, wanted.losses) >= leases.MAX_FAILURES
        wanted.state = State.FAILED if spent else back
        wanted.pause_requested, wanted.holder, wanted.live = None, None, None

    # --- time ---

    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """One worker falls silent, and the sweeper notices."""
        silent = [wanted for wanted in self.world.jobs.values() if wanted.live is not None]
        if silent:
            wanted = data.draw(st.sampled_from(silent))
            assert wanted.live is not None
            out = update(Attempt).where(Attempt.id == wanted.live.attempt_id).values(lease_until=rows.LONG_AGO)
            self.session.execute(out)
            assert leases.expire_leases(self.session) == 1
            self._lose(wanted)

    @rule(slot=st.sampled_from(SLOTS))
    def come_back(self, slot: str) -> None:
        """A slot's process was killed and starts again."""
        attempts = {held.lease.attempt_id for held in self.world.held if held.slot == slot}
        lost = [w for w in self.world.jobs.values() if w.live is not None and w.live.attempt_id in attempts]
        assert leases.reap_slot(self.session, slot) == len(lost)
        for wanted in lost:
            self._lose(wanted)

    def _lose(self, wanted: Wanted) -> None:
        if wanted.holder is not None and wanted.holder == wanted.live:
            self._give_back(wanted, is_lost=True)
        wanted.live = None

    # --- what always holds ---

    @invariant()
    def rows_agree(self) -> None:
        for job_id, wanted in getattr(self, "world", World()).jobs.items():
            job = self.session.get_one(Job, job_id, populate_existing=True)
            assert (job.state, job.pause_requested) == (wanted.state, wanted.pause_requested)
            assert (job.failures, job.losses) == (wanted.failures, wanted.losses)
            live = self.session.scalars(
                select(Attempt.id).where(Attempt.job_id == job_id, Attempt.ended_at.is_(None))
            ).all()
            assert live == ([wanted.live.attempt_id] if wanted.live else [])
            outcomes = self.session.scalars(
                select(JobEvent.outcome).where(JobEvent.job_id == job_id, JobEvent.outcome.is_not(None))
            ).all()
            assert outcomes == ([wanted.state] if wanted.state in FINAL else [])

    def _events(self, job_id: str) -> int | None:
        return self.session.scalar(select(func.count()).select_from(JobEvent).where(JobEvent.job_id == job_id))

    def _draw_job(self, data: st.DataObject) -> list[tuple[str, Wanted]]:
        jobs = list(self.world.jobs.items())
        return [data.draw(st.sampled_from(jobs))] if jobs else []


QUICK = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_whatever_happens_the_rows_agree_with_the_model(database: Database) -> None:
    machine = type("Bound", (Machine,), {"sessions": database.sessions})
    run_state_machine_as_test(machine, settings=QUICK)
