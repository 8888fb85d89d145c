"""Compares the default settings with the best of a grid of 12 points, on SNIPS and Banking.

`python -m bench.grid BASE OUT.json TECHNIQUE ... [options]`: BASE a converted SmolLM2-135M-Instruct, TECHNIQUE lora,
qlora or full. The grid of learning rate, epochs and an adapter's rank is run on one seed, and its best point is chosen
by exact matches on the validation rows; that point and the default settings are then run on every seed and scored on
the test rows. If the best point is the default settings, their runs serve for both. A second invocation continues from
the results in OUT.json.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench import task_runs
from bench.task_runs import Point, Work
from tunery.planning import advice
from tunery.spec import Full, Lora, Qlora, Technique

TECHNIQUES: dict[str, type[Full] | type[Lora]] = {"lora": Lora, "qlora": Qlora, "full": Full}
EXACT = "from worker.trainer.scoring import metrics; metrics.METRICS['json'] = (metrics.EXACT,)"
"""Scores the validation rows by exact matches, as the test rows are, not by JSON's primary metric, field overlap."""
Run = dict[str, Any]


def grid(task: str, technique: str) -> list[Point]:
    """Returns the 12 points, which include the default's, longest first; rates are multiples of the default rate."""
    if technique == "full":
        free = [(rate, None, epochs) for epochs, rate in product((5, 3, 2), (0.5, 1.0, 2.0, 4.0))]
    else:
        free = [(rate, rank, epochs) for epochs, rank, rate in product((5, 3), (64, 16), (0.5, 1.0, 2.0))]
    return [
        {"stage": "grid", "task": task, "technique": technique, "rate": rate, "rank": rank, "epochs": epochs, "seed": 0}
        for rate, rank, epochs in free
    ]


def default(task: str, technique: str, seed: int) -> Point:
    """Returns the point of a job with only default settings."""
    nothing = {"rate": None, "rank": None, "epochs": None}
    return {"stage": "default", "task": task, "technique": technique, **nothing, "seed": seed}


def work(base: Path, point: Point) -> Work:
    technique = _technique(point)
    rate = None
    if point["rate"] is not None:
        hidden = task_runs.model_info(base)["hidden_size"]
        rate = point["rate"] * advice.default_learning_rate(hidden, technique)
    chosen = {"on_validation": True, "before": EXACT} if point["stage"] == "grid" else {}
    return Work(
        base, point["task"], technique, point["seed"], epochs=point["epochs"], learning_rate=rate, **chosen
    )  # fmt: skip


def _technique(point: Point) -> Technique:
    kind = TECHNIQUES[point["technique"]]
    return kind() if point["rank"] is None else kind.model_validate({"r": point["rank"]})


def best(runs: list[Run], task: str, technique: str) -> Point | None:
    """Returns the point with the most exact matches on the validation rows, and of equals the one with the lowest loss.

    None if the grid has no runs or one has failed.
    """
    same = {"stage": "grid", "task": task, "technique": technique}
    own = [run for run in runs if run["point"].items() >= same.items()]
    if not own or any("failed" in run for run in own):
        return None
    found = max(own, key=lambda run: (run["valid_score"], -run["valid_loss"]))
    return dict(found["point"])


def is_default(base: Path, point: Point) -> bool:
    """Whether a job with only default settings gets this point's plan; runs are deterministic, so they are the same."""
    plain = default(point["task"], point["technique"], point["seed"])
    return task_runs.plan(work(base, {**point, "stage": "best"})) == task_runs.plan(work(base, plain))


def seeds(point: Point, many: int) -> list[Point]:
    """Returns the runs of the best point, one for each seed."""
    return [{**point, "stage": "best", "seed": seed} for seed in range(many)]


def lines(found: dict[tuple[str, str], tuple[Point, list[Run], list[Run]]]) -> Iterator[str]:
    """Yields the table, then each technique's mean difference, paired by seed and task."""
    yield "| task | technique | best: rate, rank, epochs | exact, default | exact, best | default minus best |"
    yield "| --- | --- | --- | --- | --- | --- |"
    differences: dict[str, list[float]] = {}
    for (task, technique), (point, plain, chosen) in found.items():
        pairs = [100 * (a["exact_tuned"] - b["exact_tuned"]) for a, b in zip(plain, chosen, strict=True)]
        differences.setdefault(technique, []).extend(pairs)
        where = f"{chosen[0]['learning_rate']:.1e}, {point['rank'] or ''}, {point['epochs'] or chosen[0]['epochs']}"
        where += " (the default's)" * (point["stage"] == "default")
        (first, shown), (second, beside) = task_runs.exact(plain), task_runs.exact(chosen)
        yield f"| {task} | {technique} | {where} | {shown} | {beside} | {first - second:+.2f} |"
    for technique, each in differences.items():
        mean, low, high = task_runs.mean_interval(each)
        yield f"{technique}: default minus best {mean:+.2f} ({low:+.2f} .. {high:+.2f}), {len(each)} pairs"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("techniques", nargs="+", choices=list(TECHNIQUES))
    parser.add_argument("--tasks", nargs="+", default=["snips", "banking"])
    parser.add_argument("--seeds", type=int, default=3)
    task_runs.add_options(parser)
    a = parser.parse_args()
    machine, both = task_runs.machine(a), list(product(a.tasks, a.techniques))

    def run(points: list[Point]) -> list[Run]:
        return task_runs.go_on(a.out, points, lambda point: work(a.base, point), machine)

    defaults = {which: [default(*which, seed) for seed in range(a.seeds)] for which in both}
    first = run([point for which in both for point in grid(*which) + defaults[which]])
    winners = {which: best(first, *which) for which in both}
    again = {
        which: defaults[which] if is_default(a.base, point) else seeds(point, a.seeds)
        for which, point in winners.items()
        if point is not None
    }
    done = first + run([point for which, points in again.items() if points != defaults[which] for point in points])
    found = {which: (points[0], _of(done, defaults[which]), _of(done, points)) for which, points in again.items()}
    complete = {which: sides for which, sides in found.items() if len(sides[1]) == len(sides[2]) == a.seeds}
    print("\n".join(lines(complete)))
    if len(complete) < len(both):
        print("not complete, as runs failed:", [which for which in both if which not in complete])


def _of(runs: list[Run], points: list[Point]) -> list[Run]:
    return [run for point in points for run in runs if run["point"] == point and "failed" not in run]


if __name__ == "__main__":
    main()
