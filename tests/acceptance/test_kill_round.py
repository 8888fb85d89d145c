"""Each part of a running stack is killed in turn while one job runs on it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import stacks
from openai import OpenAI
from sqlalchemy import exists, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from tunery import db, processes
from tunery.jobs.model import Attempt, Job, JobEvent, Metric
from tunery.local import watchdog
from tunery.local.receiver import Receiver
from tunery.local.stack import Stack

EPOCHS, ROWS = 50, 60


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A separate stack, because other tests must not be affected by the killed processes."""
    with stacks.running(tmp_path / "home", TUNERY_RENEW_SECONDS="1", TUNERY_POLL_SECONDS="1") as stack:
        yield stack


class Watch:
    """Reads the job's state from the database, and meanwhile restarts what has died, as `tunery up` does."""

    def __init__(self, stack: Stack, job_id: str) -> None:
        self.stack, self.job_id = stack, job_id
        self._engine = db.make_engine(stack.postgres.url())
        self._sessions = db.make_sessions(self._engine)

    def ask(self, query: Callable[[Session], Any]) -> Any:
        """Returns the query's result, or None while the database is down."""
        try:
            with self._sessions() as session:
                return query(session)
        except OperationalError:
            return None

    def until(self, query: Callable[[Session], Any], what: str, seconds: float = 180) -> None:
        def keep_up() -> bool:
            self.stack.restart_dead()
            return True

        met = processes.wait_until(lambda: bool(self.ask(query)), seconds=seconds, alive=keep_up, every=0.2)
        assert met, f"{what}\n{self.ask(self.story)}\n{stacks.logs(self.stack)}"

    def story(self, session: Session) -> list[str]:
        wanted = select(JobEvent.message).where(JobEvent.job_id == self.job_id, JobEvent.type == "message")
        return list(session.scalars(wanted.order_by(JobEvent.seq)))

    def until_it_moves(self, after: str) -> None:
        """Waits until a step is recorded that was trained after this call."""
        last = self.ask(lambda session: session.scalar(select(func.max(JobEvent.seq)))) or 0
        moved = exists().where(JobEvent.job_id == self.job_id, JobEvent.type == "metrics", JobEvent.seq > last)
        self.until(lambda session: session.scalar(select(moved)), f"a step after {after}")

    def state(self) -> tuple[str, str | None] | None:
        found = self.ask(lambda session: session.get_one(Job, self.job_id))
        return found and (found.state, found.error_message)

    def close(self) -> None:
        self._engine.dispose()


def _service(stack: Stack, name: str) -> psutil.Process:
    (found,) = [service.process for service in stack._services if service.name == name]
    assert found is not None
    return psutil.Process(found.pid)


def _trainer(stack: Stack) -> psutil.Process:
    found = [one for one in processes.marked(watchdog.MARK, stack._mark) if "worker.trainer" in one.cmdline()]
    assert len(found) == 1
    return found[0]


KILLS: dict[str, Callable[[Stack], psutil.Process]] = {
    "the trainer": _trainer,
    "its process": lambda stack: _service(stack, "worker-train").children()[0],
    "the worker": lambda stack: _service(stack, "worker-train"),
    "the API": lambda stack: _service(stack, "api"),
    "Valkey": lambda stack: psutil.Process(stack.valkey.pid),
    "PostgreSQL": lambda stack: psutil.Process(stack.postgres.pid),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_survives_the_death_of_every_part(stack: Stack, base_folder: Path) -> None:
    with stacks.connect(stack) as client, Receiver() as receiver:
        stacks.add_base(stack, client, base_folder)
        endpoint = client.webhooks.create(name="test", url=receiver.url, event_types=[stacks.SUCCEEDED])
        receiver.secret = endpoint.signing_secret
        job_id = _submit(stack, client)
        watch = Watch(stack, job_id)
        watch.until_it_moves("the beginning")
        for name, find in KILLS.items():
            killed = find(stack)
            killed.kill()
            assert processes.wait_until(lambda: not processes.is_alive(killed.pid), seconds=10, alive=lambda: True)  # noqa: B023
            watch.until_it_moves(name)
            assert watch.state() == ("running", None), name
        ended = exists().where(Job.id == job_id, Job.finished_at.is_not(None))
        watch.until(lambda session: session.scalar(select(ended)), "its end", seconds=400)
        assert watch.state() == ("succeeded", None), watch.ask(watch.story)
        steps = watch.ask(lambda session: session.scalars(select(Metric.step).where(Metric.job_id == job_id)).all())
        assert sorted(steps) == list(range(1, EPOCHS * ROWS + 1))
        outcomes = watch.ask(lambda s: s.scalars(select(Attempt.outcome).order_by(Attempt.number)).all())
        assert outcomes == ["crashed", "lost", "lost", "succeeded"]
        assert receiver.wait_for(stacks.SUCCEEDED, job_id, seconds=60), receiver.refused
        assert receiver._verified == [(stacks.SUCCEEDED, job_id)]
        watch.close()


def _submit(stack: Stack, client: OpenAI) -> str:
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=stacks.upload(client, "train.jsonl", stacks.rows(ROWS)),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": 1}}},
        extra_body={"technique": {"type": "lora", "r": 4}},
    ).id
