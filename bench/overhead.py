"""What the service costs over the trainer by hand on the same run directory: `python -m bench.overhead [ROWS [PAIRS]]`.

Each pair is a job through the API and `python -m worker.trainer` on a directory laid out for that very job. Compared
are the seconds of the training loop (what supervising costs while it trains) and, as a figure that a busy machine
cannot blur, the CPU time that all service processes used while the job ran.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import select

from bench import service
from tunery import db, wire
from tunery.jobs.model import Attempt, Job, Metric
from tunery.local import guard
from tunery.local.stack import Stack
from tunery.settings import get_settings
from tunery.storage import open_storage
from worker.supervisor import staging
from worker.supervisor.process import MARK, environment

GOAL = 0.02
"""Share of the training time."""


def by_service(stack: Stack, client: httpx.Client, training_file: str) -> tuple[str, dict[str, float]]:
    job_id, _ = service.submit(client, training_file, hyperparameters={"n_epochs": 1, "batch_size": 8}, seed=1)
    service.until(lambda: _job(job_id).state == "running", stack, every=0.02)
    before = _cpu_seconds(stack)
    service.until(lambda: _job(job_id).finished_at is not None, stack, every=0.5)
    after = _cpu_seconds(stack)
    job = _job(job_id)
    assert job.state == "succeeded", job.error_message
    with db.transaction() as session:
        attempt = session.scalars(select(Attempt).where(Attempt.job_id == job_id)).one()
        steps = session.scalars(select(Metric.values["seconds"].as_float()).where(Metric.job_id == job_id)).all()
    assert attempt.ended_at is not None
    return job_id, {
        "claim_to_end": (attempt.ended_at - attempt.started_at).total_seconds(),
        "run": job.progress["seconds"],
        "steps": sum(steps),
        "service_cpu": after - before,
    }


def by_hand(job_id: str, folder: Path) -> dict[str, float]:
    """The trainer alone, as the supervisor would start it."""
    settings = get_settings()
    with db.transaction() as session:
        needs = staging.needs_of(session, session.get_one(Job, job_id))
    began = time.monotonic()
    staging.lay_out(needs, folder, settings.models_dir, open_storage(settings), lambda: None)
    laid_out = time.monotonic()
    command = [sys.executable, "-m", "worker.trainer", str(folder)]
    with (folder / "log.txt").open("wb") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, check=True, cwd=service.ROOT, env=environment((), "by hand")
        )
    said = [wire.parse(line) for line in done.stdout.splitlines()]
    (finished,) = (message for message in said if isinstance(message, wire.Finished))
    return {
        "laying_out": laid_out - began,
        "process": time.monotonic() - laid_out,
        "run": finished.seconds,
        "steps": sum(message.seconds for message in said if isinstance(message, wire.Step)),
    }


def _job(job_id: str) -> Job:
    with db.transaction() as session:
        return session.get_one(Job, job_id)


def _cpu_seconds(stack: Stack) -> float:
    """Of everything that belongs to the stack, the trainers apart."""
    mark = json.loads((stack.home / "stack.json").read_text())["mark"]
    servers = [psutil.Process(pid) for pid in (stack.postgres.pid, stack.valkey.pid) if pid]
    ours = [*guard.marked(mark), *servers, *(child for server in servers for child in server.children(recursive=True))]
    return sum(_used(found) for found in {found.pid: found for found in ours}.values())


def _used(found: psutil.Process) -> float:
    try:
        if MARK in found.environ():
            return 0.0
        times = found.cpu_times()
        return float(times.user + times.system)
    except psutil.Error:
        return 0.0


def main() -> int:
    rows, pairs = (int(text) for text in (*sys.argv[1:], "160", "2")[:2])
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home, service.running(Path(home) / "home") as (stack, client):
        training_file = service.upload(client, service.banking(rows))
        for number in range(pairs):
            job_id, served = by_service(stack, client, training_file)
            runs.append({"service": served, "hand": by_hand(job_id, Path(home) / f"hand-{number}")})
    steps = {way: statistics.median(run[way]["steps"] for run in runs) for way in ("service", "hand")}
    cpu = statistics.median(run["service"]["service_cpu"] / run["service"]["claim_to_end"] for run in runs)
    around = statistics.median(run["service"]["claim_to_end"] - run["hand"]["process"] for run in runs)
    found = {
        "what": "seconds; LoRA r 16 on the CPU, one epoch, batch 8",
        "base": service.BASE,
        "rows": rows,
        "slower_steps": steps["service"] / steps["hand"] - 1,
        "service_cpu_share_of_a_core": cpu,
        "seconds_around_the_trainer": around,
        "goal": GOAL,
        "runs": runs,
    }
    service.write("service_overhead_cpu.json", found)
    return 0 if found["slower_steps"] < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
