"""Measures how replay of the base's own answers affects general ability and the task's score, on three tasks.

`python -m bench.replay BASE OUT.json [options]`: BASE a converted SmolLM2-135M-Instruct. LoRA with default settings on
Banking, SNIPS and free text, without replay and with 3 and 10 % of it, several runs at once on each GPU. A second
invocation continues from the results in OUT.json. The base's answers and scores are kept next to OUT.json for all runs.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from bench import task_runs
from bench.task_runs import Point, Work
from tunery import digests
from tunery.spec import Lora, Replay

SHARES = (None, 0.03, 0.1)
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "task": lambda run: 100 * task_score(run),
    "general change": lambda run: 100 * run["general"]["change"],
    "KL": lambda run: run["general"]["forgetting"]["kl"],
    "loss on prompts": lambda run: run["general"]["forgetting"]["nll_change"],
}
"""Figures by name: points of the task's score, points of general accuracy against the base, nats per token."""
Runs = list[dict[str, Any]]


def task_score(run: dict[str, Any]) -> float:
    """Returns the exact matches, or for free text the primary metric."""
    if run["task"] == "utterances":
        return float(run["metrics"][run["primary"]]["tuned"])
    return float(run["exact_tuned"])


def lines(runs: Runs) -> Iterator[str]:
    """Yields a row for each task and share, then for each share all runs and the paired differences from no replay."""
    yield f"| task | replay | runs | {' | '.join(FIGURES)} |"
    yield f"| --- | --- | --- |{' --- |' * len(FIGURES)}"
    good = [run for run in runs if "failed" not in run]
    tasks, shares = (list(dict.fromkeys(run["point"][name] for run in good)) for name in ("task", "share"))
    for task, share in product([*tasks, None], shares):
        own = [run for run in good if run["point"]["share"] == share and task in (None, run["point"]["task"])]
        if own:
            cells = [_shown([figure(run) for run in own]) for figure in FIGURES.values()]
            yield f"| {task or 'all'} | {_percent(own[0])} | {len(own)} | {' | '.join(cells)} |"
    for share in (share for share in shares if share is not None):
        pairs = list(_pairs(good, share))
        if pairs:
            found = (f"{name} {_shown([figure(a) - figure(b) for a, b in pairs])}" for name, figure in FIGURES.items())
            yield f"{_percent(pairs[0][0])} minus none, {len(pairs)} pairs: {'; '.join(found)}"


def _pairs(runs: Runs, share: float) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields each run of that share with the run without replay on the same task and seed."""
    for run in (run for run in runs if run["point"]["share"] == share):
        yield from ((run, other) for other in runs if other["point"] == {**run["point"], "share": None})


def _percent(run: dict[str, Any]) -> str:
    share = run["point"]["share"]
    return "none" if share is None else f"{share:.0%}"


def _shown(values: list[float]) -> str:
    mean, low, high = task_runs.mean_interval(values)
    return f"{mean:+.2f} ({low:+.2f} .. {high:+.2f})"


def host(base: Path, folder: Path) -> Path:
    """Lays out the base as a host keeps one, with its content's hash, by which its scores and answers are found."""
    here = folder / base.name
    if not (here / "manifest.json").exists():
        here.mkdir(parents=True, exist_ok=True)
        files = sorted(file for file in base.iterdir() if file.is_file() and file.name != "manifest.json")
        for file in files:
            (here / file.name).unlink(missing_ok=True)
            (here / file.name).symlink_to(file.resolve())
        (here / "manifest.json").write_text(json.dumps({file.name: digests.sha256(file) for file in files}))
    return here


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["snips", "banking", "utterances"])
    parser.add_argument("--seeds", type=int, default=3)
    task_runs.add_options(parser)
    a = parser.parse_args()
    folder = a.out.with_suffix(".host")
    base = host(a.base, folder)

    def work(point: Point) -> Work:
        replay = None if point["share"] is None else Replay(share=point["share"])
        return Work(base, point["task"], Lora(), point["seed"], general=True, replay=replay, scores=folder / "scores")

    points = [
        {"task": task, "share": share, "seed": seed}
        for task, share, seed in product(a.tasks, reversed(SHARES), range(a.seeds))
    ]
    runs = task_runs.go_on(a.out, points, work, task_runs.machine(a))
    print("\n".join(lines(runs)))
    sampled = [run["replay"] for run in runs if "failed" not in run and run["replay"]]
    if sampled:
        print("replay rows an epoch:", sorted({(said["rows_an_epoch"], said["prompts"]) for said in sampled}))
        print(f"share reached, in the mean: {statistics.mean(said['share'] for said in sampled):.3f}")
    for run in (run for run in runs if "failed" in run):
        print("failed:", run["point"], task_runs.brief(run))


if __name__ == "__main__":
    main()
