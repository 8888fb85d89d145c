"""Compares quotes with what jobs took, after one calibration run: `python -m bench.quotes OUT.json [SHAPE]`.

SmolLM2, or a random model of one of make_model's shapes, is trained on a CPU through the API and real workers. The
first job calibrates; the others differ in rows, epochs, batches and held-out rows. The trainers measure processor time
(`bench.cpu_clock`), as other work on the machine stretches wall-clock time, and have one thread, as several spend
processor time on waiting for each other. The comparison covers the trainer's work from its spec to its artifact,
without imports and upload. The wall-clock time is shown too.
"""

import argparse
import itertools
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from bench import service
from tunery import db
from tunery.jobs import quoting
from tunery.jobs.model import Job
from tunery.local.stack import Stack
from tunery.models.model import Model
from tunery.planning import quote, speed, workload
from tunery.planning.speed import Record
from tunery.planning.workload import Counts
from tunery.spec import Plan

GOAL = 0.2
"""The largest relative error of a quote."""
_LINES = 400


class Files:
    """Uploads files that share no rows: rows that were prepared for one job would be reused by the next."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client
        self._lines = iter(itertools.cycle(service.banking(_LINES)))

    def take(self, rows: int) -> str:
        return service.upload(self._client, list(itertools.islice(self._lines, rows)))


def jobs(files: Files) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns the calibration job and then jobs of other sizes, each with its number of test rows."""
    few = {"general": {"items": 20, "prompts": 4}, "max_new_tokens": 24}
    return [
        ("calibration", 8, {
            "training_file": files.take(80), "validation_file": files.take(8),
            "evaluation": {**few, "test_file": files.take(8)}, "hyperparameters": {"n_epochs": 1, "batch_size": 8},
        }),
        ("twice the rows, nothing held out", 0, {
            "training_file": files.take(160), "hyperparameters": {"n_epochs": 1, "batch_size": 8},
        }),
        ("three epochs, batches of 4", 0, {
            "training_file": files.take(40), "validation_file": files.take(16),
            "hyperparameters": {"n_epochs": 3, "batch_size": 4},
        }),
        ("batches of 16, a test file", 16, {
            "training_file": files.take(64), "evaluation": {**few, "test_file": files.take(16)},
            "hyperparameters": {"n_epochs": 2, "batch_size": 16},
        }),
        ("20 rows, once", 0, {
            "training_file": files.take(20), "hyperparameters": {"n_epochs": 1, "batch_size": 5},
        }),
    ]  # fmt: skip


def run(stack: Stack, client: httpx2.Client, asked: dict[str, Any]) -> str:
    """Submits a job and waits for its end; returns its id."""
    job_id, _ = service.submit(client, **asked, seed=1)
    done = f"/fine_tuning/jobs/{job_id}"
    service.until(lambda: client.get(done).json()["finished_at"] is not None, stack, seconds=1800, every=0.5)
    job = client.get(done).json()
    assert job["status"] == "succeeded", job["error"]
    return job_id


def measured(job_id: str, test_rows: int) -> tuple[Job, Record]:
    """Returns a job and its run's record, with the work that was known once its files had been read."""
    with db.transaction() as session:
        job = session.get_one(Job, job_id)
        (record,) = [each for each in quoting.records(session, job, "CPU") if each.job == job_id]
        work = workload.of_job(
            Plan.model_validate(job.plan),
            session.get_one(Model, job.base_model).model_info,
            Counts(1, 1, "rows", test_rows=test_rows),
            "cpu",
        )
    counted = {name: part.units for name, part in record.spent.items()}
    work = replace(
        work,
        steps=record.work.steps,
        tokens=record.work.tokens,
        row_tokens=counted.get("rows", 0),
        valid_tokens=counted.get("validation", 0),
        pair_tokens=counted.get("pairs", 0),
        reference_tokens=counted.get("reference", 0),
    )
    return job, replace(record, around=0.0, work=work)


def compare(what: str, job: Job, record: Record, calibration: Record) -> dict[str, Any]:
    """Compares a job's quote from the calibration with what the job took."""
    parts = quote.seconds_of(record.work, speed.scaled(speed.of_record(calibration), calibration.work, record.work))
    expected = sum(parts.values())
    return {
        "job": what,
        "steps": record.work.steps,
        "trained_tokens": record.work.tokens,
        "answers": record.work.answers,
        "quoted_cpu_seconds": round(expected, 2),
        "quoted_parts": {name: round(seconds, 2) for name, seconds in parts.items()},
        "actual_cpu_seconds": round(record.trainer_seconds, 2),
        "actual_parts": {name: round(part.seconds, 2) for name, part in record.spent.items()},
        "error": round(record.trainer_seconds / expected - 1, 3),
        "clock_seconds": (job.actual or {})["seconds"],
        "load_at_end": round(os.getloadavg()[0], 2),
    }


def _made(home: str, shape: str) -> Path | None:
    if not shape:
        return None
    from bench import make_model  # imports torch

    make_model.make(Path(home) / shape, shape)
    return Path(home) / shape


def main(out: str, shape: str) -> int:
    os.environ["TUNERY_FILE_REPORTS"] = "false"
    os.environ["TUNERY_PLUGINS"] = "bench.cpu_clock"
    os.environ["OMP_NUM_THREADS"] = "1"
    runs: list[dict[str, Any]] = []
    calibration: Record | None = None
    with tempfile.TemporaryDirectory() as home, service.running(Path(home) / "home", _made(home, shape)) as stacked:
        stack, client = stacked
        for what, test_rows, asked in jobs(Files(client)):
            job, record = measured(run(stack, client, asked), test_rows)
            calibration = calibration or record
            runs.append(compare(what, job, record, calibration))
            print(runs[-1], flush=True)
    errors = {each["job"]: each["error"] for each in runs[1:]}
    meets = all(abs(error) <= GOAL for error in errors.values())
    found = {
        "what": "processor seconds of the trainer, quoted by the first run and taken; LoRA r 16 on the CPU",
        "base": f"random weights of the shape {shape}" if shape else service.BASE,
        "goal": GOAL,
        "errors": errors,
        "meets_goal": meets,
        "runs": runs,
    }
    service.write(out, found)
    return 0 if meets else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.json")
    parser.add_argument("shape", nargs="?", default="", metavar="SHAPE")
    sys.exit(main(**vars(parser.parse_args())))
