"""What `tunery files report` finds of injected faults, and how long it takes:
`python -m bench.report FREE.jsonl [SEEDS [SPEED_ROWS]]`.

Labelled rows and the other file are those of examples/ (Banking); FREE.jsonl has chat rows with free-form answers.
"""

import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import injector, service
from tunery.datasets.report import maker
from tunery.datasets.report.maker import Report

LABELLED, FREE, TEST = 330, 170, 200
GOALS = {"contradiction": (0.85, 0.80), "mislabelled": (0.0, 0.0)}
GOAL = (0.95, 0.95)
GOAL_AT_K = 0.80
GOAL_SECONDS = 60


def read(path: Path) -> list[injector.Row]:
    return [{"messages": json.loads(line)["messages"]} for line in path.read_text(encoding="utf-8").splitlines()]


def apart(rows: Sequence[injector.Row], count: int, taken: list[set[str]], most: int = 2000) -> list[injector.Row]:
    """The first `count` rows whose question shares at most 55 % of its three-character runs with no other."""
    found = []
    for row in rows:
        text = injector.user(row)["content"].lower()
        runs = {text[at : at + 3] for at in range(len(text) - 2)}
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        plain = roles == ["user", "assistant"] and "@" not in str(row) and len(text) > 12 and len(str(row)) < most
        if plain and all(len(runs & other) <= 0.55 * len(runs | other) for other in taken):
            taken.append(runs)
            found.append(row)
            if len(found) == count:
                break
    return found


def judge(seed: int, free: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Hits, misses and false alarms of each kind for the faults of one seed."""
    dice = random.Random(seed)
    sources = [read(service.ROOT / f"examples/banking_{name}.jsonl") for name in ("test", "train")] + [read(free)]
    taken: list[set[str]] = []
    test, labelled, texts = (
        apart(dice.sample(rows, len(rows)), count, taken)
        for rows, count in zip(sources, (TEST, LABELLED, FREE), strict=True)
    )
    dirty = injector.inject(labelled, texts, test, seed)
    injector.write(dirty.rows, folder / "dirty.jsonl")
    injector.write(test, folder / "test.jsonl")
    return score(dirty, maker.make(folder / "dirty.jsonl", folder / "test.jsonl"))


def score(dirty: injector.Dirty, report: Report) -> dict[str, dict[str, int]]:
    found = {}
    for kind, groups in dirty.faults.items():
        lines = [line for finding in report.findings if finding.kind == kind for line in finding.lines]
        hits = sum(bool(group & set(lines)) for group in groups)
        false = sorted(set(lines) - dirty.lines[kind] - dirty.neutral)
        first = lines[: len(groups)]
        found[kind] = {
            "faults": len(groups),
            "hits": hits,
            "false": len(false),
            "first": len(set(first) & dirty.lines[kind]),
        }
        missed = [min(group) for group in groups if not group & set(lines)]
        print(kind, found[kind], "missed", missed, "false", false, flush=True)
    return found


def pool(seeds: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, Any]]:
    """Precision and recall of each kind over all seeds; for wrong labels also the precision of the first k."""
    pooled: dict[str, dict[str, Any]] = {}
    for kind in injector.COUNTS:
        sums = {name: sum(seed[kind][name] for seed in seeds) for name in ("faults", "hits", "false", "first")}
        precision = sums["hits"] / max(1, sums["hits"] + sums["false"])
        pooled[kind] = {**sums, "precision": round(precision, 4), "recall": round(sums["hits"] / sums["faults"], 4)}
    pooled["mislabelled"]["precision_at_k"] = round(pooled["mislabelled"]["first"] / pooled["mislabelled"]["faults"], 4)
    return pooled


def met(pooled: dict[str, dict[str, Any]]) -> bool:
    goals = {kind: GOALS.get(kind, GOAL) for kind in pooled}
    enough = [one["precision"] >= goals[kind][0] and one["recall"] >= goals[kind][1] for kind, one in pooled.items()]
    return all(enough) and pooled["mislabelled"]["precision_at_k"] >= GOAL_AT_K


def time_report(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of a report on many distinct rows, a tenth of them near-duplicates, with leaks."""
    dice = random.Random(0)
    words = sorted(
        {
            word
            for row in read(service.ROOT / "examples/snips_train.jsonl")
            for word in injector.user(row)["content"].split()
        }
    )
    labels = [f'{{"intent": "class_{at}"}}' for at in range(20)]

    def row() -> injector.Row:
        asked = dice.choices(range(len(words)), k=dice.randint(6, 20))
        text, label = " ".join(words[at] for at in asked), labels[max(asked) % len(labels)]
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}

    made = [row() for _ in range(rows * 9 // 10)]
    made += [injector.leaked(one, dice) for one in made[: rows - len(made)]]
    injector.write(made, folder / "many.jsonl")
    injector.write(made[:: len(made) // 2000], folder / "other.jsonl")
    load, began, used = os.getloadavg()[0], time.monotonic(), time.process_time()
    report = maker.make(folder / "many.jsonl", folder / "other.jsonl")
    return {
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "load_before": round(load, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "findings": dict(report.counts()),
    }


def main(free: str, seeds: str = "5", speed_rows: str = "100000") -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed = time_report(int(speed_rows), folder) if int(speed_rows) else None
        print(speed, flush=True)
        pooled = pool([judge(seed, Path(free), folder) for seed in range(int(seeds))]) if int(seeds) else {}
    for kind, one in pooled.items():
        print(f"{kind:18} precision {one['precision']:.3f} recall {one['recall']:.3f}", one.get("precision_at_k", ""))
    what = "injected faults found by the report, and its time on many rows"
    goals = {"goal": GOAL, "goals": GOALS, "goal_at_k": GOAL_AT_K, "goal_seconds": GOAL_SECONDS}
    service.write("report_cpu.json", {"what": what, "seeds": int(seeds), **goals, "kinds": pooled, "speed": speed})
    return 0 if not pooled or met(pooled) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
