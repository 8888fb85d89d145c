"""Compares the task's score after training on a file with known faults and on the same file cleaned as suggested.

`python -m bench.clean --prepare FOLDER` writes the files, which needs `tunery[report]` and no GPU.
`python -m bench.clean BASE OUT.json --rows FOLDER [options]` trains on them: BASE a converted SmolLM2-135M-Instruct,
LoRA with default settings, several runs at once on each GPU. A second run continues from the results in OUT.json.

`bench.injector` makes the faults: at the level `faults` as many in a hundred rows as `bench.report` injects, at the
level `labels` with wrong labels in three rows of ten. Four sets of rows are compared: the examples' own (`original`),
those with faults, less the rows that a job refuses (`noisy`), those that `tunery files clean --recommended --against
VALIDATION` keeps (`clean`), and 500 of these (`curated`). The test rows have no faults; leaks are of validation rows.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench import task_runs
from bench.task_runs import Point, Work
from tunery.spec import Lora

TASKS = ("banking", "snips")
LEVELS = ("labels", "faults")
ORIGINAL, MADE = "original", ("noisy", "clean", "curated")
CURATED = 500


def points(tasks: list[str], seeds: int) -> list[Point]:
    """Returns the runs, the longest first. The rows without faults are run once for both levels."""
    ordered = sorted(tasks, key=TASKS.index, reverse=True)
    made = [
        {"task": task, "level": level, "rows": name, "seed": seed}
        for task, level, name, seed in product(ordered, LEVELS, MADE, range(seeds))
    ]
    plain = [
        {"task": task, "level": None, "rows": ORIGINAL, "seed": seed} for task, seed in product(ordered, range(seeds))
    ]
    return sorted(plain + made, key=lambda point: ordered.index(point["task"]))


def work(base: Path, folder: Path, point: Point) -> Work:
    rows = None
    if point["rows"] != ORIGINAL:
        rows = folder / f"{point['task']}-{point['level']}-{point['seed']}" / point["rows"]
        if not rows.is_dir():
            raise SystemExit(f"{rows} is missing. Write it: python -m bench.clean --prepare {folder}")
    return Work(base, point["task"], Lora(), point["seed"], rows=rows)


def lines(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a row for each task, level and set of rows, then each set's gain over `noisy`, paired by seed."""
    yield "| task | level | rows | runs | steps | exact |"
    yield "| --- | --- | --- | --- | --- | --- |"
    good = [run for run in runs if "failed" not in run]
    of: dict[tuple[str, str | None, str], dict[int, dict[str, Any]]] = {}
    for run in good:
        point = run["point"]
        of.setdefault((point["task"], point["level"], point["rows"]), {})[point["seed"]] = run
    for (task, level, name), by_seed in of.items():
        steps = sorted({run["steps"] for run in by_seed.values()})
        shown = task_runs.exact(by_seed[seed] for seed in sorted(by_seed))[1]
        yield f"| {task} | {level or ''} | {name} | {len(by_seed)} | {', '.join(map(str, steps))} | {shown} |"
    for (task, level, name), by_seed in of.items():
        noisy = of.get((task, level, "noisy"), {})
        pairs = [
            100 * (run["exact_tuned"] - noisy[seed]["exact_tuned"]) for seed, run in by_seed.items() if seed in noisy
        ]
        if name != "noisy" and pairs:
            mean, low, high = task_runs.mean_interval(pairs)
            yield f"{task}, {level}: {name} minus noisy {mean:+.2f} ({low:+.2f} .. {high:+.2f}), {len(pairs)} pairs"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the files and end")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="where --prepare wrote them")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    task_runs.add_options(parser)
    a = parser.parse_args()
    if a.prepare is not None:
        from bench import clean_files  # the host of the runs need not have its packages

        return clean_files.prepare(a.prepare, a.seeds)
    if a.base is None or a.out is None or a.rows is None:
        parser.error("name BASE, OUT.json and --rows FOLDER, or --prepare FOLDER")
    wanted = points(a.tasks, a.seeds)
    runs = task_runs.go_on(a.out, wanted, lambda point: work(a.base, a.rows, point), task_runs.machine(a))
    print("\n".join(lines(runs)))
    for run in (run for run in runs if "failed" in run):
        print("failed:", run["point"], task_runs.brief(run))
    return None


if __name__ == "__main__":
    main()
