"""A file's report: the list of checks, each in its place."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tunery.datasets.report import (
    answers,
    contradictions,
    duplicates,
    leaks,
    length,
    mislabels,
    output_format,
    privacy,
    roles,
    truncation,
)
from tunery.datasets.report.case import Case, Check, Finding
from tunery.datasets.report.rows import Row, read

CHECKS: list[Check] = [
    roles.find,
    answers.find_empty,
    truncation.find,
    length.find,
    privacy.find,
    duplicates.find_exact,
    duplicates.find_near,
    contradictions.find,
    leaks.find,
    mislabels.find,
    output_format.find,
    answers.find_echoes,
    answers.find_dominant,
    answers.find_imbalance,
]
"""In order: a check may read what earlier ones found."""
_EXPLAINED = ("wrong_roles", "empty_output")
"""Kinds that say of a row why a job would refuse it."""


@dataclass(frozen=True)
class Report:
    """What was found in a file of so many rows."""

    rows: int
    findings: list[Finding]

    def counts(self) -> Counter[str]:
        """Findings of each kind."""
        return Counter(finding.kind for finding in self.findings)

    def as_json(self) -> str:
        """The report for programs."""
        return json.dumps({"rows": self.rows, "findings": [finding.as_dict() for finding in self.findings]}, indent=1)


def make(path: Path, against: Path | None = None, *, base: Path | None = None, max_tokens: int = 2048) -> Report:
    """The report of one file. `against`: a validation or test file; `base`: a folder with tokenizer.json.

    Raises InvalidRows where a file's bytes are no rows, CannotRender where the base has no tokenizer.
    """
    count = length.tokenizer(base) if base else None
    case = Case(read(path), read(against) if against else (), max_tokens, count)
    for check in CHECKS:
        case.findings.extend(check(case))
    named = case.lines_found(*_EXPLAINED)
    case.findings.extend(_refused(row) for row in case.rows if row.fault and row.line not in named)
    return Report(len(case.rows), case.findings)


def _refused(row: Row) -> Finding:
    return Finding("invalid_row", [row.line], 1.0, str(row.fault), "Correct the row: a job would refuse it.")
