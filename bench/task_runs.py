"""Runs the trainer on the examples' rows, as a job does, several runs at once on each of a host's GPUs."""

import argparse
import gzip
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.train_side_by_side import hardware
from tunery.planning import advice
from tunery.spec import Evaluation, Gate, General, Hyperparameters, Plan, Replay, Run, Technique, TrainingSpec

UTTERANCES = {"train": 1215, "valid": 200, "test": 300}
"""Rows of the task in free text: as many training rows as Banking has."""
EXAMPLES = Path(__file__).parents[1] / "examples"
_TRAINER = "import sys; {before}; from worker.trainer.__main__ import main; sys.exit(main())"
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 0.975, by degrees of freedom from 1."""

Point = dict[str, Any]
"""What a bench varies, in JSON's types: a later invocation finds a run by it."""


@dataclass(frozen=True)
class Work:
    """One run. None: what a job without that setting gets. `before`: Python that the trainer runs first.

    Base and tuned model answer the test rows; with `on_validation` only the tuned one answers, the validation rows.
    General ability is measured with a `gate` or with `general`. `scores`: the folder that the runs on a base share, as
    those of a host do. `rows`: a folder whose files, TASK_PART.jsonl.gz, replace the examples'.
    """

    base: Path
    task: str
    technique: Technique
    seed: int
    epochs: int | None = None
    learning_rate: float | None = None
    before: str = "pass"
    gate: Gate | None = None
    general: bool = False
    on_validation: bool = False
    replay: Replay | None = None
    scores: Path | None = None
    rows: Path | None = None


@dataclass(frozen=True)
class Machine:
    """What runs may take: the number of GPUs, of runs at once on each, and the seconds of one run."""

    gpus: int = 1
    at_once: int = 6
    limit: float = 900

    def each(self, works: Sequence[Work]) -> list[dict[str, Any]]:
        """Returns the outcome of each run, in the order of the works."""
        found = dict(self.as_done(works))
        return [found[number] for number in range(len(works))]

    def as_done(self, works: Sequence[Work]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the number and outcome of each run as it ends."""
        free: queue.Queue[int] = queue.Queue()
        for place in range(self.gpus * self.at_once):
            free.put(place % self.gpus)

        def do(work: Work) -> dict[str, Any]:
            gpu = free.get()
            try:
                return train(work, self._environment(gpu), self.limit)
            finally:
                free.put(gpu)

        with ThreadPoolExecutor(self.gpus * self.at_once) as pool:
            running = {pool.submit(do, work): number for number, work in enumerate(works)}
            for done in as_completed(running):
                yield running[done], done.result()

    def _environment(self, gpu: int) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // (self.gpus * self.at_once))
        return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": str(threads)}


def go_on(out: Path, points: Iterable[Point], work: Callable[[Point], Work], machine: Machine) -> list[dict[str, Any]]:
    """Returns the runs of all points, each with its `point`; those in `out` are not repeated.

    Each run is written to `out` as it ends. The next invocation repeats those that failed.
    """
    known = json.loads(out.read_text())["runs"] if out.exists() else []
    runs: list[dict[str, Any]] = [run for run in known if "failed" not in run]
    points = list(points)
    left = [point for point in points if all(run["point"] != point for run in runs)]
    for number, outcome in machine.as_done([work(point) for point in left]):
        runs.append({"point": left[number]} | outcome)
        _write(out, {**hardware(), "runs": runs})
        print(len(runs), json.dumps(left[number]), brief(outcome), flush=True)
    return [run for point in points for run in runs if run["point"] == point]


def _write(out: Path, found: dict[str, Any]) -> None:
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(out)


def brief(run: dict[str, Any]) -> str:
    """Returns a run's outcome in a few words."""
    if "failed" in run:
        return f"failed: {run['failed']} {run['log'][-300:]}"
    score = run["exact_tuned"] if run["exact_tuned"] is not None else run["valid_score"]
    return f"{100 * score:.1f} % in {run['seconds']} s"


def train(work: Work, environment: dict[str, str] | None = None, limit: float | None = None) -> dict[str, Any]:
    """Runs the trainer in its own process and returns the outcome: `failed` and the log's end if it did not finish."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        _lay_out(folder, work)
        command = [sys.executable, "-c", _TRAINER.format(before=work.before), str(folder)]
        found: dict[str, Any] = {"task": work.task, "seed": work.seed}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
        except subprocess.TimeoutExpired:
            return found | {"failed": f"took longer than {limit} s", "log": ""}
        said = {message["type"]: message for message in map(json.loads, done.stdout.splitlines())}
        if "finished" not in said:
            return found | {"failed": said.get("failed") or "no message", "log": done.stderr[-2000:]}
        return found | _outcome(folder, said)


def _outcome(folder: Path, said: dict[str, dict[str, Any]]) -> dict[str, Any]:
    described = json.loads((folder / "out/training_config.json").read_text())
    parity = json.loads((folder / "out/parity.json").read_text())
    score = said.get("score", {})
    return {
        "epochs": described["plan"]["n_epochs"],
        "learning_rate": described["plan"]["learning_rate"],
        "precision": described["precision"],
        "frozen_products": described["paths"]["frozen products"],
        "exact_base": score.get("base_exact"),
        "exact_tuned": score.get("tuned_exact"),
        "primary": score.get("primary"),
        "metrics": score.get("metrics"),
        "rows": score.get("rows"),
        "valid_loss": said["evaluated"]["loss"],
        "valid_score": said["evaluated"].get("task_score"),
        "train_loss": said["step"]["train_loss"],
        "steps": said["finished"]["steps"],
        "general": score.get("general"),
        "replay": described["replay"],
        "gate": said.get("gated"),
        "seconds": round(said["finished"]["seconds"], 1),
        "peak_gib": round((said["finished"]["peak_memory_bytes"] or 0) / 2**30, 2),
        "parity_difference": parity["difference"],
    }


def exact(runs: Iterable[dict[str, Any]]) -> tuple[float, str]:
    """Returns the mean of the runs' exact matches in percent, and a text of it with each run's value."""
    found = [100 * run["exact_tuned"] for run in runs]
    mean = statistics.mean(found)
    return mean, f"{mean:.1f} % ({', '.join(f'{one:.1f}' for one in found)})"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean and its 95 % interval by Student's t, which is infinite for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    quantile = _QUANTILES[min(len(values) - 1, len(_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _lay_out(folder: Path, work: Work) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(work.base.resolve())
    for part in ("train", "valid", "test"):
        (folder / f"data/{part}.jsonl").write_text("".join(rows_of(work.task, part, work.rows)))
    if work.scores is not None:
        work.scores.mkdir(exist_ok=True)
        (folder / "scores").symlink_to(work.scores.resolve())
    run = Run(job="bench", base_model=work.base.name, plan=plan(work), public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())


def rows_of(task: str, part: str, folder: Path | None = None) -> list[str]:
    """Returns the lines of a part of a task: those in `folder`, if it has any, or those of the examples.

    The task `utterances` is SNIPS reversed.
    """
    if folder is not None and (packed := folder / f"{task}_{part}.jsonl.gz").exists():
        return gzip.decompress(packed.read_bytes()).decode().splitlines(keepends=True)
    if task != "utterances":
        return (EXAMPLES / f"{task}_{part}.jsonl").read_text().splitlines(keepends=True)
    return list(map(_turned, rows_of("snips", part)[: UTTERANCES[part]]))


def _turned(line: str) -> str:
    """Returns the reverse of a row, which asks for the command from which some JSON was made: free text."""
    *_, command, answer = json.loads(line)["messages"]
    asked = f"Write what the user of a voice assistant said.\n{answer['content']}"
    turned = [{"role": "user", "content": asked}, {"role": "assistant", "content": command["content"]}]
    return json.dumps({"messages": turned}, ensure_ascii=False) + "\n"


def plan(work: Work) -> Plan:
    """Returns the plan of a job with only the work's settings, by the function that plans jobs."""
    general = General(enabled=work.general or work.gate is not None)
    evaluation = Evaluation(test_file="test", general=general)
    if work.on_validation:
        evaluation = Evaluation(task_rows=1000, every_steps=10**9, general=General(enabled=False))
    spec = TrainingSpec(
        technique=work.technique,
        seed=work.seed,
        learning_rate=work.learning_rate,
        hyperparameters=Hyperparameters(n_epochs=work.epochs or "auto"),
        evaluation=evaluation,
        gate=work.gate,
        replay=work.replay,
    )
    examples = len(rows_of(work.task, "train", work.rows))
    return advice.resolve(spec, examples=examples, model_info=model_info(work.base), bf16_fits=True)


def model_info(base: Path) -> dict[str, Any]:
    """Returns what the converter wrote about the base."""
    found: dict[str, Any] = json.loads((base / "facts.json").read_text())
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds a bench's options that say what its runs may take."""
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=6, help="runs on each GPU")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one run")


def machine(options: argparse.Namespace) -> Machine:
    """Returns the machine that those options describe."""
    return Machine(options.gpus, options.at_once, options.limit)
