"""Quotes against what jobs took, after one calibration run: `python -m bench.quotes OUT.json [SHAPE]`.

SmolLM2, or a random model of a shape of make_model's, is trained on a CPU through the API and real workers. The first
job's quote is a guess; its run calibrates. The others have other numbers of rows, epochs, batches and held-out rows.
Beside the seconds of the clock, which other work on the machine stretches, stand the trainer's processor seconds, and
the share of the cores that it got.
"""

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import make_model, service
from tunery.local.stack import Stack
from tunery.settings import get_settings
from worker.supervisor.process import MARK

GOAL = 0.2
"""The most that a job may take longer or shorter than quoted."""
_LINES = 400


class Files:
    """Rows that no other file of the bench has: what was prepared for one job would be found again by the next."""

    def __init__(self, client: httpx2.Client) -> None:
        self._client = client
        self._lines = iter(itertools.cycle(service.banking(_LINES)))

    def take(self, rows: int) -> str:
        return service.upload(self._client, list(itertools.islice(self._lines, rows)))


def jobs(files: Files) -> list[tuple[str, dict[str, Any]]]:
    """The calibration, and then jobs of other sizes; each with its training file."""
    few = {"general": {"items": 20, "prompts": 4}, "max_new_tokens": 24}
    return [
        ("calibration", {
            "training_file": files.take(80), "validation_file": files.take(8),
            "evaluation": {**few, "test_file": files.take(8)}, "hyperparameters": {"n_epochs": 1, "batch_size": 8},
        }),
        ("twice the rows, nothing held out", {
            "training_file": files.take(160), "hyperparameters": {"n_epochs": 1, "batch_size": 8},
        }),
        ("three epochs, batches of 4", {
            "training_file": files.take(64), "validation_file": files.take(16),
            "hyperparameters": {"n_epochs": 3, "batch_size": 4},
        }),
        ("batches of 16, a test file", {
            "training_file": files.take(128), "evaluation": {**few, "test_file": files.take(16)},
            "hyperparameters": {"n_epochs": 2, "batch_size": 16},
        }),
        ("20 rows, once", {
            "training_file": files.take(20), "hyperparameters": {"n_epochs": 1, "batch_size": 5},
        }),
    ]  # fmt: skip


def run(stack: Stack, client: httpx2.Client, what: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Submits a job and waits for its end: what it was quoted, and what it took."""
    body = {**asked, "seed": 1}
    tried = client.post("/fine_tuning/jobs", json={"model": service.BASE, **body, "dry_run": True}).raise_for_status()
    before = _trainers_cpu()  # the imports of one that waits already
    job_id, _ = service.submit(client, **body)
    used: dict[int, float] = {}

    def ended() -> bool:
        used.update(_trainers_cpu())
        return client.get(f"/fine_tuning/jobs/{job_id}").json()["finished_at"] is not None

    service.until(ended, stack, seconds=1800, every=0.25)
    job = client.get(f"/fine_tuning/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job["error"]
    quote, actual = job["quote"], job["actual"]
    cpu = max(seconds - before.get(pid, 0.0) for pid, seconds in used.items())
    return {
        "job": what,
        "steps": job["progress"]["step"],
        "trained_tokens": job["trained_tokens"],
        "tokens_quoted": quote["tokens"],
        "speed_from": quote["speed_from"],
        "dry_run_seconds": tried.json()["quote"]["seconds"],
        "quoted_seconds": quote["seconds"],
        "quoted_parts": quote["parts"],
        "quoted_cost": quote["cost"],
        "actual_seconds": actual["seconds"],
        "actual_cost": actual["cost"],
        "of_quoted": actual["of_quoted"],
        "in_range": actual["in_range"],
        "trainer_cpu_seconds": round(cpu, 1),
        "cores_got": round(cpu / actual["seconds"], 3),
        "load_at_end": round(os.getloadavg()[0], 2),
    }


def _trainers_cpu() -> dict[int, float]:
    """Processor seconds of the trainers that are running, by their process ids."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(get_settings().runs_dir)):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        except psutil.Error:
            continue
    return found


def _made(home: str, shape: str) -> Path | None:
    if not shape:
        return None
    make_model.make(Path(home) / shape, shape)
    return Path(home) / shape


def main() -> int:
    out, shape = (*sys.argv[1:], "")[:2]
    os.environ["TUNERY_GPU_HOUR_PRICES"] = '{"CPU": 0.1}'
    os.environ["TUNERY_FILE_REPORTS"] = "false"
    runs = []
    with tempfile.TemporaryDirectory() as home, service.running(Path(home) / "home", _made(home, shape)) as stacked:
        stack, client = stacked
        for what, asked in jobs(Files(client)):
            runs.append(run(stack, client, what, asked))
            print(runs[-1], flush=True)
            time.sleep(20)  # the next trainer's imports, which an idle worker has behind it
    after, calibration = runs[1:], runs[0]
    for each in after:
        # As if the machine had given the trainer as much of its cores as in the calibration.
        each["of_quoted_at_equal_load"] = round(each["of_quoted"] * each["cores_got"] / calibration["cores_got"], 3)
    errors = {each["job"]: round(each["of_quoted"] - 1, 3) for each in after}
    meets = all(abs(error) <= GOAL for error in errors.values())
    found = {
        "what": "seconds from the claim to the end, quoted once the files were read and taken; LoRA r 16 on the CPU",
        "base": f"random weights of the shape {shape}" if shape else service.BASE,
        "goal": GOAL,
        "errors": errors,
        "meets_goal": meets,
        "runs": runs,
    }
    service.write(out, found)
    return 0 if meets else 1


if __name__ == "__main__":
    sys.exit(main())
