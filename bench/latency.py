"""Measures the time from a job's submission to its first step, with an idle worker: `python -m bench.latency`.

Every time but the request's own comes from the database: from the job's events, its attempt and its first metric,
which is written up to a second after the step.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import select

from bench import service
from tunery import db
from tunery.jobs.model import Attempt, Job, Metric
from tunery.local.stack import Stack

JOBS = 10
GOAL_SECONDS = 1.0
"""The longest time in the queue while a worker is idle."""


def one(stack: Stack, client: httpx2.Client, training_file: str) -> dict[str, float]:
    job_id, answer = service.submit(
        client, training_file, hyperparameters={"n_epochs": 1, "batch_size": 8}, seed=1, max_seq_length=256
    )
    service.until(lambda: _first_step(job_id) is not None, stack, every=0.05)
    found = _times(job_id) | {"answer": answer}
    client.post(f"/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    service.until(_is_idle, stack)
    return found


def _first_step(job_id: str) -> Any:
    with db.transaction() as session:
        return session.scalar(select(Metric.created_at).where(Metric.job_id == job_id).order_by(Metric.step).limit(1))


def _is_idle() -> bool:
    with db.transaction() as session:
        return session.scalar(select(Attempt.id).where(Attempt.ended_at.is_(None))) is None


def _times(job_id: str) -> dict[str, float]:
    with db.transaction() as session:
        job = session.get_one(Job, job_id)
        attempt = session.scalars(select(Attempt).where(Attempt.job_id == job_id)).one()
    assert job.queued_at is not None
    first = _first_step(job_id)
    return {
        "validation": (job.queued_at - job.created_at).total_seconds(),
        "queueing": (attempt.started_at - job.queued_at).total_seconds(),
        "claim_to_first_step": (first - attempt.started_at).total_seconds(),
        "submit_to_first_step": (first - job.created_at).total_seconds(),
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as home, service.running(Path(home)) as (stack, client):
        training_file = service.upload(client, service.banking(48))
        runs = [one(stack, client, training_file) for _ in range(JOBS)]
    summary = {
        name: {"median": statistics.median(run[name] for run in runs), "worst": max(run[name] for run in runs)}
        for name in runs[0]
    }
    meets = summary["queueing"]["worst"] < GOAL_SECONDS
    found = {"what": "seconds, one idle worker", "base": service.BASE, "jobs": JOBS, "summary": summary, "runs": runs}
    service.write("service_latency_cpu.json", found | {"goal_seconds_queueing": GOAL_SECONDS, "meets_goal": meets})
    return 0 if meets else 1


if __name__ == "__main__":
    sys.exit(main())
