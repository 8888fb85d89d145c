"""Measures the task gain and the loss of general ability of LoRA at two learning rates, and the gate's verdict.

`python -m bench.gate BASE OUT.json [options]`: BASE a converted SmolLM2-135M-Instruct. Trains on the examples'
Banking rows on a GPU, several runs at once. The first rate is the default; the other keeps the task's score, but the
model forgets.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench import task_runs
from bench.train_side_by_side import hardware
from tunery.spec import Gate, Lora

TOO_HIGH = 3e-3
GATE = Gate(min_task_gain=0.5, max_general_drop=0.03)


def lines(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the table, with a line for each run."""
    yield "| task | rate | seed | exact | general, base | tuned | change | KL | gate |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for run in runs:
        if "failed" in run:
            yield f"| {run['task']} | failed: {run['failed']} {run['log'][-300:]} |"
            continue
        general, gate = run["general"], run["gate"]
        kl = general["forgetting"]
        yield (
            f"| {run['task']} | {run['learning_rate']:.1e} | {run['seed']} | {100 * run['exact_tuned']:.1f} % | "
            f"{100 * general['base_accuracy']:.1f} % | {100 * general['tuned_accuracy']:.1f} % | "
            f"{100 * general['change']:+.1f} ({100 * general['change_low']:+.1f} .. "
            f"{100 * general['change_high']:+.1f}) | {kl['kl']:.3f} ({kl['kl_low']:.3f} .. {kl['kl_high']:.3f}) | "
            f"{gate['status']} |"
        )
    for rate in dict.fromkeys(run.get("learning_rate") for run in runs):
        same = [run for run in runs if run.get("learning_rate") == rate and "failed" not in run]
        if same:
            change = statistics.mean(100 * run["general"]["change"] for run in same)
            yield f"rate {rate:.1e}: exact {task_runs.exact(same)[1]}, general {change:+.2f} points in the mean"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["banking"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    task_runs.add_options(parser)
    a = parser.parse_args()
    works = [
        task_runs.Work(a.base, task, Lora(), seed, a.epochs, learning_rate=rate, gate=GATE)
        for task, rate, seed in product(a.tasks, (None, TOO_HIGH), range(a.seeds))
    ]
    runs = task_runs.machine(a).each(works)
    a.out.write_text(json.dumps({**hardware(), "gate": GATE.model_dump(), "runs": runs}, indent=1) + "\n")
    for line in lines(runs):
        print(line)


if __name__ == "__main__":
    main()
