"""Measures what the service adds to the trainer started by hand: `python -m bench.overhead [ROWS [PAIRS]]`.

Each pair is a job through the API and `python -m worker.trainer` on a run directory laid out for the same job. The cost
has two parts, and a busy machine blurs neither. One is the seconds around the run: from the claim to the stored model,
less the run itself; by hand from the process's start to its end, less the run. The other is the CPU time of all service
processes while the job ran, as a fraction of the machine's, which is what a trainer that uses every core loses. The
steps' own seconds are recorded with the machine's load; on an idle machine they show the same cost.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
from sqlalchemy import select

from bench import service
from tunery import db, processes
from tunery import trainer_protocol as protocol
from tunery.jobs.model import Attempt, Job, Metric
from tunery.local import watchdog
from tunery.local.stack import Stack
from tunery.settings import get_settings
from tunery.storage import open_storage
from worker.supervisor import staging
from worker.supervisor.process import MARK, environment

GOAL = 0.02
"""The highest cost, as a fraction of the run's time."""


def by_service(stack: Stack, client: httpx2.Client, training_file: str) -> tuple[str, dict[str, float]]:
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
        "load_at_end": os.getloadavg()[0],
    }


def by_hand(job_id: str, folder: Path) -> dict[str, float]:
    """Runs the trainer alone, as the supervisor would start it; returns its times."""
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
    said = [protocol.parse(line) for line in done.stdout.splitlines()]
    (finished,) = (message for message in said if isinstance(message, protocol.Finished))
    return {
        "laying_out": laid_out - began,
        "process": time.monotonic() - laid_out,
        "run": finished.seconds,
        "steps": sum(message.seconds for message in said if isinstance(message, protocol.Step)),
        "load_at_end": os.getloadavg()[0],
    }


def _job(job_id: str) -> Job:
    with db.transaction() as session:
        return session.get_one(Job, job_id)


def _cpu_seconds(stack: Stack) -> float:
    """Returns the CPU seconds of all processes of the stack except its trainers."""
    mark = json.loads((stack.home / "stack.json").read_text())["mark"]
    servers = [psutil.Process(pid) for pid in (stack.postgres.pid, stack.valkey.pid) if pid]
    ours = [
        *processes.marked(watchdog.MARK, mark),
        *servers,
        *(child for server in servers for child in server.children(recursive=True)),
    ]
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
            job_id, measured = by_service(stack, client, training_file)
            runs.append({"service": measured, "hand": by_hand(job_id, Path(home) / f"hand-{number}")})
    around = _around([run["service"] for run in runs], "claim_to_end") - _around(
        [run["hand"] for run in runs], "process"
    )
    fractions = [run["service"]["service_cpu"] / (os.cpu_count() or 1) / run["service"]["run"] for run in runs]
    shortest = min(run["service"]["run"] for run in runs)
    cost = statistics.median(fractions) + max(0.0, around) / shortest  # a negative difference is noise of the starts
    found = {
        "what": "seconds; LoRA r 16 on the CPU, one epoch, batch 8",
        "base": service.BASE,
        "rows": rows,
        "seconds_around_the_run": around,
        "service_cpu_share_of_the_machine": statistics.median(fractions),
        "cost": cost,
        "goal": GOAL,
        "meets_goal": cost < GOAL,
        "runs": runs,
    }
    service.write("service_overhead_cpu.json", found)
    return 0 if cost < GOAL else 1


def _around(runs: list[dict[str, float]], whole: str) -> float:
    return statistics.median(run[whole] - run["run"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
