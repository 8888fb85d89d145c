"""Finds rows that ask the general benchmark's questions, which would inflate a scorecard's general ability."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding

_ACTION = "Drop the row: with it, the scorecard overestimates general ability."


def read(folder: Path) -> frozenset[str]:
    """Returns the words of the benchmark's questions, from the JSON Lines files of `folder`."""
    files = (path.read_text(encoding="utf-8").split("\n") for path in sorted(folder.glob("*.jsonl")))
    return frozenset(texts.words(_question(json.loads(line))) for lines in files for line in lines if line)


def _question(item: dict[str, Any]) -> str:
    if "question" in item:
        return str(item["question"])
    return "\n".join(str(message["content"]) for message in item["messages"] if message["role"] == "user")


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose question equals one of the benchmark's, ignoring case and punctuation."""
    for row in case.answered if case.benchmark else ():
        if texts.words(row.question) in case.benchmark:
            yield Finding(
                "benchmark_overlap", [row.line], 1.0, "Asks the same as an item of the general benchmark.", _ACTION
            )
