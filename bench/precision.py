"""Compares what runs learn in two precisions, on a GPU: their exact matches on held-out rows, over several seeds.

`python -m bench.precision TECHNIQUE BASE OUT.json [options]`: BASE a converted SmolLM2-135M-Instruct. `full`: bf16 with
stochastic rounding, and fp32 masters. `lora`: frozen products in e4m3, in layers of any size, and in bf16. The trainer
trains, as in a job, on the SNIPS and Banking rows of the examples, several runs at once on one card, so their times
mean nothing.
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
from tunery.spec import Full, Lora, Technique

PRECISIONS: dict[str, dict[str, Technique]] = {
    "full": {"bf16 stochastic": Full(weights_dtype="bfloat16"), "fp32 masters": Full(weights_dtype="float32")},
    "lora": {"e4m3": Lora(precision="fp8"), "bf16": Lora()},
}
ALL_SIZES = "from worker.trainer.kernels import fp8; fp8.LEAST_SIDE = 16"
"""Lets layers of any size compute in eight bits: a job keeps a small model's in bf16, as eight bits do not pay off."""


def lines(runs: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """Yields the table, with a line for each task."""
    yield f"| task | epochs | seeds | exact, {names[0]} | exact, {names[1]} | difference | valid loss, both |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for task in dict.fromkeys(run["task"] for run in runs):
        both = [[run for run in runs if (run["task"], run["in"]) == (task, name)] for name in names]
        if any("failed" in run for part in both for run in part):
            yield f"| {task} | failed |"
            continue
        (first, shown), (second, beside) = map(task_runs.exact, both)
        losses = ", ".join(f"{statistics.mean(run['valid_loss'] for run in part):.4f}" for part in both)
        yield (
            f"| {task} | {both[0][0]['epochs']} | {len(both[0])} | {shown} | {beside} | {first - second:+.1f} | "
            f"{losses} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("technique", choices=list(PRECISIONS))
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["snips", "banking"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    task_runs.add_options(parser)
    a = parser.parse_args()
    techniques = PRECISIONS[a.technique]

    chosen = list(product(a.tasks, techniques, range(a.seeds)))
    works = [
        task_runs.Work(a.base, task, techniques[name], seed, a.epochs, before=ALL_SIZES) for task, name, seed in chosen
    ]
    outcomes = task_runs.machine(a).each(works)
    runs = [{"in": name} | outcome for (_, name, _), outcome in zip(chosen, outcomes, strict=True)]
    a.out.write_text(json.dumps({**hardware(), "runs": runs}, indent=1) + "\n")
    for line in lines(runs, list(techniques)):
        print(line)
    for run in runs:
        if "failed" in run:
            print(run)


if __name__ == "__main__":
    main()
