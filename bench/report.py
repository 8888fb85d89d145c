"""Measures which injected faults `tunery files report` finds, and how long it takes:
`python -m bench.report FREE.jsonl [SEEDS [SPEED_ROWS [FIRST_SEED [BASE]]]]`.

Three files are judged: FREE.jsonl's chat rows with free-form answers, mixed with Banking's labelled rows of examples/,
with those of SNIPS, and alone. Features were chosen on seeds below 420. Times are those of a file of labelled rows and
of one of free-text rows. If SPEED_ROWS is 0, the record keeps its times; if SEEDS is 0, what was found. With the folder
of a BASE, it is asked about answers that may break off, and there is a record of its own, without times.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import injector, service
from bench.process_memory import host_bytes
from tunery.datasets.report import answer_ends, maker
from tunery.datasets.report.maker import Report

LABELLED, FREE, TEST = 330, 170, 200
MAX_TOKENS = 2048
FILES = ("banking", "snips", "free")
OF_LABELS = ("contradiction", "mislabelled")
SHORTEST = 25
"""The least characters of a free answer: a part of a shorter one is often a whole answer too."""
LABELS = (("test", TEST), ("train", LABELLED))
GOALS = {"contradiction": (0.85, 0.80), "mislabelled": (0.0, 0.0)}
GOAL = (0.95, 0.95)
GOAL_AT_K = 0.80
GOAL_SECONDS = 60
RECORD, RECORD_WITH_BASE = "report_cpu.json", "report_with_base_cpu.json"
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def read(path: Path) -> list[injector.Row]:
    return [{"messages": json.loads(line)["messages"]} for line in path.read_text(encoding="utf-8").splitlines()]


def apart(rows: Sequence[injector.Row], count: int, taken: list[set[str]], least: int = 0) -> list[injector.Row]:
    """Returns the first `count` rows whose question shares at most 55 % of its three-character runs with any other."""
    found = []
    for row in rows:
        text = injector.user(row)["content"].lower()
        runs = {text[at : at + 3] for at in range(len(text) - 2)}
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        plain = roles == ["user", "assistant"] and "@" not in str(row) and len(text) > 12 and len(str(row)) < 2000
        plain = plain and len(row["messages"][-1]["content"]) >= least
        if plain and all(len(runs & other) <= 0.55 * len(runs | other) for other in taken):
            taken.append(runs)
            found.append(row)
            if len(found) == count:
                break
    return found


def judge(seed: int, free: Path, folder: Path, file: str, base: Path | None) -> dict[str, dict[str, int]]:
    """Returns hits, misses and false alarms of each kind for the faults of one seed in one of FILES."""
    dice = random.Random(seed)
    taken: list[set[str]] = []

    def draw(path: Path, count: int, least: int = 0) -> list[injector.Row]:
        rows = read(path)
        return apart(dice.sample(rows, len(rows)), count, taken, least)

    if file == "free":
        counts = {kind: count for kind, count in injector.COUNTS.items() if kind not in OF_LABELS}
        test, labelled, texts = draw(free, counts["test_leak"], SHORTEST), [], draw(free, 2 * FREE, SHORTEST)
    else:
        counts = injector.COUNTS
        test, labelled = (draw(service.ROOT / f"examples/{file}_{name}.jsonl", count) for name, count in LABELS)
        texts = draw(free, FREE, SHORTEST)
    dirty = injector.inject(labelled, texts, test, seed, counts)
    injector.write(dirty.rows, folder / "dirty.jsonl")
    injector.write(test, folder / "test.jsonl")
    ask = answer_ends.asking(base, MAX_TOKENS) if base else None
    return score(dirty, maker.make(folder / "dirty.jsonl", folder / "test.jsonl", max_tokens=MAX_TOKENS, ask=ask))


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
    """Returns precision and recall of each kind over all seeds; for wrong labels also the precision at k."""
    pooled: dict[str, dict[str, Any]] = {}
    for kind in seeds[0]:
        sums = {name: sum(seed[kind][name] for seed in seeds) for name in ("faults", "hits", "false", "first")}
        precision = sums["hits"] / max(1, sums["hits"] + sums["false"])
        pooled[kind] = {**sums, "precision": round(precision, 4), "recall": round(sums["hits"] / sums["faults"], 4)}
    if wrong := pooled.get("mislabelled"):
        wrong["precision_at_k"] = round(wrong["first"] / wrong["faults"], 4)
    return pooled


def met(pooled: dict[str, dict[str, Any]]) -> bool:
    goals = {kind: GOALS.get(kind, GOAL) for kind in pooled}
    enough = [one["precision"] >= goals[kind][0] and one["recall"] >= goals[kind][1] for kind, one in pooled.items()]
    return all(enough) and pooled.get("mislabelled", {}).get("precision_at_k", 1) >= GOAL_AT_K


def labelled_rows(count: int, _: Path, dice: random.Random) -> list[injector.Row]:
    """Returns rows of random words with one of 20 labels, which the words decide by a rule that no classifier of words
    learns: the labels are as good as random."""
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
        return exchange(" ".join(words[at] for at in asked), labels[max(asked) % len(labels)])

    return [row() for _ in range(count)]


def free_rows(count: int, free: Path, dice: random.Random) -> list[injector.Row]:
    """Returns distinct rows of random lines and sentences: three are asked, three to six answered."""
    answers, asked = (
        [
            part
            for row in read(free)
            for part in SENTENCE.split(row["messages"][at]["content"])
            if len(part.strip()) > 12
        ]
        for at in (-1, -2)
    )
    made: dict[str, injector.Row] = {}
    while len(made) < count:
        question = " ".join(dice.choices(asked, k=3))
        made[question] = exchange(question, "\n".join(dice.choices(answers, k=dice.randint(3, 6))))
    return list(made.values())


def exchange(question: str, answer: str) -> injector.Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def time_report(rows: int, made: list[injector.Row], folder: Path) -> dict[str, Any]:
    """Measures time and peak memory of a report on many rows, a tenth of them near-duplicates, with leaks."""
    dice = random.Random(0)
    made = made + [injector.leaked(one, dice) for one in made[: rows - len(made)]]
    injector.write(made, folder / "many.jsonl")
    injector.write(made[:: len(made) // 2000], folder / "other.jsonl")
    load, began, used = os.getloadavg()[0], time.monotonic(), time.process_time()
    report = maker.make(folder / "many.jsonl", folder / "other.jsonl")
    return {
        "rows": rows,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "load_before": round(load, 1),
        "peak_rss_mib": host_bytes() // 2**20,
        "findings": dict(report.counts()),
    }


def time_reports(rows: int, free: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Measures both kinds of rows. The peak memory of the second is at least that of the first."""
    dice, kinds = random.Random(0), {"labelled": labelled_rows, "free": free_rows}
    return {kind: time_report(rows, make(rows * 9 // 10, free, dice), folder) for kind, make in kinds.items()}


def recorded(part: str) -> Any:
    """Returns a part of the existing record, which a run that does not measure it keeps."""
    return json.loads((service.RESULTS / RECORD).read_text(encoding="utf-8"))[part]


def main(free: Path, seeds: int, speed_rows: int, first: int, base: Path | None) -> int:
    chosen = range(first, first + seeds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed = time_reports(speed_rows, free, folder) if speed_rows else recorded("speed")
        print(speed, flush=True)
        judged = {file: [judge(seed, free, folder, file, base) for seed in chosen] for file in FILES if chosen}
    pooled = {file: pool(seeds) for file, seeds in judged.items()}
    found = (
        {"seeds": list(chosen), "files": pooled} if chosen else {part: recorded(part) for part in ("seeds", "files")}
    )
    for file, kinds in pooled.items():
        for kind, one in kinds.items():
            figures = f"precision {one['precision']:.3f} recall {one['recall']:.3f}"
            print(f"{file:8} {kind:18} {figures}", one.get("precision_at_k", ""))
    what = "injected faults found by the report, and its time on many rows"
    goals = {"goal": GOAL, "goals": GOALS, "goal_at_k": GOAL_AT_K, "goal_seconds": GOAL_SECONDS}
    if base:
        service.write(RECORD_WITH_BASE, {"what": what, "base": base.name, **goals, **found})
    else:
        service.write(RECORD, {"what": what, **goals, **found, "speed": speed})
    return 0 if all(map(met, pooled.values())) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("free", type=Path, metavar="FREE.jsonl")
    parser.add_argument("seeds", type=int, nargs="?", default=5, metavar="SEEDS")
    parser.add_argument("speed_rows", type=int, nargs="?", default=100_000, metavar="SPEED_ROWS")
    parser.add_argument("first", type=int, nargs="?", default=200, metavar="FIRST_SEED")
    parser.add_argument("base", type=Path, nargs="?", metavar="BASE")
    sys.exit(main(**vars(parser.parse_args())))
