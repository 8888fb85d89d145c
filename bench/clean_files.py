"""Writes the training files of `bench.clean`: rows with known faults, and the same rows cleaned as the report suggests.

They are written on a host with the packages of `tunery[report]`, which the host of the runs need not have.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

from bench import injector, task_runs
from bench.clean import CURATED, LEVELS, TASKS
from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning
from tunery.datasets.report.rows import read

ROWS = 600
"""Rows of the file that `injector.COUNTS` is for: a file with more rows gets proportionally more faults."""
WRONG_LABELS = 0.3
"""Share of the rows that get a wrong label at the level `labels`."""


def prepare(folder: Path, seeds: int) -> None:
    """Writes FOLDER/TASK-LEVEL-SEED/{noisy,clean,curated}/TASK_train.jsonl.gz, and next to these folders
    lineage.json.gz, which has the injected faults and what the cleaning did."""
    for task in TASKS:
        for level in LEVELS:
            for seed in range(seeds):
                said = _prepare(folder / f"{task}-{level}-{seed}", task, level, seed)
                print(task, level, seed, json.dumps(said), flush=True)


def _prepare(folder: Path, task: str, level: str, seed: int) -> dict[str, Any]:
    train, valid = ([_row(line) for line in task_runs.rows_of(task, part)] for part in ("train", "valid"))
    dirty = injector.inject(train, [], valid, seed, counts(len(train), level))
    folder.mkdir(parents=True, exist_ok=True)
    source, other, target = (folder / name for name in ("dirty.jsonl", "valid.jsonl", "cleaned.jsonl"))
    injector.write(dirty.rows, source)
    injector.write(valid, other)
    done = cleaner.clean(source, target, Cleaning(recommended=True), against=other).as_dict()
    lines, clean = (path.read_text(encoding="utf-8").splitlines(keepends=True) for path in (source, target))
    accepted = {row.line for row in read(source) if row.fault is None}
    noisy = [line for number, line in enumerate(lines, 1) if number in accepted]
    curated = random.Random(seed).sample(clean, CURATED)
    for name, rows in (("noisy", noisy), ("clean", clean), ("curated", curated)):
        _pack(folder / name / f"{task}_train.jsonl.gz", "".join(rows))
    faults = {kind: sorted(of_kind) for kind, of_kind in dirty.lines.items()}
    _pack(folder / "lineage.json.gz", json.dumps({"faults": faults, "cleaning": done}))
    for path in (source, other, target):
        path.unlink()
    return summary(faults, done) | {"rows": len(lines), "noisy": len(noisy), "clean": len(clean)}


def counts(rows: int, level: str) -> dict[str, int]:
    """Returns how many faults of each kind a file gets. None is a row over the limit: a job leaves those out itself."""
    scaled = {kind: round(count * rows / ROWS) for kind, count in injector.COUNTS.items() if kind != "too_long"}
    return scaled if level == "faults" else {**scaled, "mislabelled": round(WRONG_LABELS * rows)}


def summary(faults: dict[str, list[int]], done: dict[str, Any]) -> dict[str, Any]:
    """Returns, for each kind, how many rows have the fault and how many of them the cleaning dropped or changed."""
    touched = {one["line"] for part in ("dropped", "changed") for one in done[part]}
    seen = {kind: [len(lines), len(touched & set(lines))] for kind, lines in faults.items()}
    known = {line for lines in faults.values() for line in lines}
    return {"injected, seen": seen, "seen without a fault": len(touched - known)}


def _row(line: str) -> injector.Row:
    return {"messages": json.loads(line)["messages"]}


def _pack(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
