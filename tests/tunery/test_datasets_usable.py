"""The usable rows of a file: those that a cleaning would keep, except refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunery.datasets.cleaning import cleaner
from tunery.datasets.cleaning.order import Cleaning
from tunery.datasets.report import maker, usable
from tunery.datasets.report.case import Finding


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _found(*kinds_and_lines: tuple[str, list[int]], score: float = 1.0) -> list[Finding]:
    return [Finding(kind, lines, score, "", "") for kind, lines in kinds_and_lines]


@pytest.mark.parametrize(
    ("findings", "out"),
    [
        (_found(("exact_duplicate", [1, 2, 3])), {2: "exact_duplicate", 3: "exact_duplicate"}),
        (_found(("near_duplicate", [4, 7])), {7: "near_duplicate"}),
        (_found(("contradiction", [4, 7])), {4: "contradiction", 7: "contradiction"}),
        # The row without another fault is the one that is kept.
        (_found(("exact_duplicate", [1, 2]), ("empty_output", [1])), {1: "empty_output"}),
        (_found(("contradiction", [1, 2]), ("mislabelled", [2])), {2: "mislabelled"}),
        (_found(("mislabelled", [2]), score=0.49), {}),
        (_found(("truncated_output", [5]), ("refusal", [6])), {5: "truncated_output", 6: "refusal"}),
        (_found(("wrong_roles", [5]), ("invalid_row", [6])), {5: "wrong_roles", 6: "invalid_row"}),
        # A redacted row is still usable; a finding that only describes the file excludes no row.
        (_found(("pii", [5]), ("low_diversity", [1, 2]), ("label_imbalance", [3])), {}),
    ],
)
def test_rows_that_do_not_count(findings: list[Finding], out: dict[int, str]) -> None:
    assert usable.left_out(findings) == out


def test_a_report_counts_what_a_cleaning_keeps(tmp_path: Path) -> None:
    words = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "juniper"]
    rows = [
        _chat(f"What does the {word} form {at} ask for in part {at * 7}?", f"é{word}") for at, word in enumerate(words)
    ]
    rows += [
        rows[0],
        rows[0],
        _chat("Who signs the lease of a barn?", ""),
        _chat("Where do herons nest in March?", "Öd"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    counted = maker.make(path).summary()["usable"]
    kept = cleaner.clean(path, tmp_path / "clean.jsonl", Cleaning(recommended=True)).as_dict()["counts"]["kept"]

    assert counted["rows"] == kept == 11
    assert counted["left_out"] == {"exact_duplicate": 2, "empty_output": 1}
    assert counted["answer_bytes"] == sum(len(f"é{word}".encode()) for word in words) + len("Öd".encode())
