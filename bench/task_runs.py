"""Runs of the trainer on the examples' SNIPS and Banking rows, as a job does them, several at once on one device."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunery.planning import advice
from tunery.spec import Evaluation, Gate, General, Plan, Run, Technique

EXAMPLES = Path(__file__).parents[1] / "examples"
MAX_NEW_TOKENS = {"snips": 96, "banking": 32}
_TRAINER = "import sys; {before}; from worker.trainer.__main__ import main; sys.exit(main())"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """One run. `learning_rate` None: the technique's default. `before`: Python that the trainer runs first.

    General ability is measured where there is a `gate`.
    """

    base: Path
    task: str
    technique: Technique
    seed: int
    epochs: int
    learning_rate: float | None = None
    before: str = "pass"
    gate: Gate | None = None


def train(work: Work) -> dict[str, Any]:
    """What came of a run in a process of its own; `failed` and its log's end where nothing did."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run"
        _lay_out(folder, work)
        command = [sys.executable, "-c", _TRAINER.format(before=work.before), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = {message["type"]: message for message in map(json.loads, done.stdout.splitlines())}
        found: dict[str, Any] = {"task": work.task, "seed": work.seed, "epochs": work.epochs}
        if "finished" not in said:
            return found | {"failed": said.get("failed") or "no message", "log": done.stderr[-2000:]}
        described = json.loads((folder / "out/training_config.json").read_text())
        parity = json.loads((folder / "out/parity.json").read_text())
    return found | {
        "learning_rate": described["plan"]["learning_rate"],
        "precision": described["precision"],
        "frozen_products": described["paths"]["frozen products"],
        "exact_base": said["score"]["base_exact"],
        "exact_tuned": said["score"]["tuned_exact"],
        "rows": said["score"]["rows"],
        "valid_loss": said["evaluated"]["loss"],
        "train_loss": said["step"]["train_loss"],
        "steps": said["finished"]["steps"],
        "general": said["score"]["general"],
        "gate": said.get("gated"),
        "seconds": round(said["finished"]["seconds"], 1),
        "peak_gib": round((said["finished"]["peak_memory_bytes"] or 0) / 2**30, 2),
        "parity_difference": parity["difference"],
    }


def each(items: Iterable[Item], do: Callable[[Item], dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """What `do` gives for each of the items, `at_once` of them at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(do, items))


def exact(runs: Iterable[dict[str, Any]]) -> tuple[float, str]:
    """The mean of the runs' exact matches in percent, and its text with every run's own."""
    found = [100 * run["exact_tuned"] for run in runs]
    mean = statistics.mean(found)
    return mean, f"{mean:.1f} % ({', '.join(f'{one:.1f}' for one in found)})"


def _lay_out(folder: Path, work: Work) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "base").symlink_to(work.base.resolve())
    for part in ("train", "valid", "test"):
        (folder / f"data/{part}.jsonl").symlink_to(EXAMPLES / f"{work.task}_{part}.jsonl")
    hidden = json.loads((work.base / "config.json").read_text())["hidden_size"]
    rate = work.learning_rate or advice.default_learning_rate(hidden, work.technique)
    plan = Plan(
        technique=work.technique, n_epochs=work.epochs, batch_size=advice.BATCH_SIZE, seed=work.seed,
        learning_rate_multiplier=1, learning_rate=rate,
        evaluation=Evaluation(
            test_file="test", max_new_tokens=MAX_NEW_TOKENS[work.task], general=General(enabled=work.gate is not None)
        ),
        gate=work.gate,
    )  # fmt: skip
    run = Run(job="bench", base_model=work.base.name, plan=plan, public_checkpoints=0, snapshot_seconds=3600)
    (folder / "spec.json").write_text(run.model_dump_json())
