"""Makes a file's report by a list of checks."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunery.datasets.report import (
    answers,
    benchmark,
    contradictions,
    diversity,
    duplicates,
    elsewhere,
    languages,
    leaks,
    length,
    mislabels,
    output_format,
    plausibility,
    privacy,
    refusals,
    roles,
    scripts,
    tokens,
    truncation,
    usable,
    verdict,
)
from tunery.datasets.report.case import Ask, Case, Check, Finding, invalid_row
from tunery.datasets.report.elsewhere import Other
from tunery.datasets.report.rows import can_be_compared, read, read_other
from tunery.datasets.report.verdict import Verdict
from tunery.rows import readers
from tunery.rows.answer_losses import AnswerLoss

CHECKS: list[Check] = [
    roles.find,
    roles.find_calls,
    answers.find_empty,
    truncation.find,
    length.find,
    privacy.find,
    duplicates.find_exact,
    duplicates.find_near,
    contradictions.find,
    leaks.find,
    elsewhere.find,
    benchmark.find,
    mislabels.find,
    plausibility.find,
    output_format.find,
    answers.find_echoes,
    answers.find_dominant,
    answers.find_imbalance,
    refusals.find,
    diversity.find,
    scripts.find,
    languages.find,
]
"""In order, as a check may read earlier findings."""
_EXPLAINED = ("wrong_roles", "empty_output")
"""Kinds that already explain why a job would refuse a row."""


MOST = 100_000_000
"""Maximum characters of the checked rows, as memory grows with them. The verdict is about the whole file."""


@dataclass(frozen=True)
class Report:
    """What was found in a file. `rows`: those that were judged, all of them but in a file of more than MOST characters.
    `figures`: of the rows as a whole. `digests`: what other files of the project are compared with. `usable`: the rows
    that no finding speaks against."""

    rows: int
    findings: list[Finding]
    verdict: Verdict | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    digests: bytes = field(default=b"", repr=False)
    usable: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """Findings of each kind."""
        return Counter(finding.kind for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """Returns the report in a few values."""
        named = {line for finding in self.findings for line in finding.lines}
        found = {"rows": self.rows, "findings": len(self.findings), "rows_named": len(named)}
        return (
            found
            | {"counts": dict(self.counts()), "usable": self.usable}
            | self._tokens()
            | (self.verdict.as_dict() if self.verdict else {})
        )

    def _tokens(self) -> dict[str, Any]:
        """Returns the number of rows that a base's tokenizer has counted, and of their tokens."""
        found = self.figures.get("tokens")
        if not found or not found["total"]:
            return {}
        return {"tokens": {"rows": found["spreads"]["row"]["count"], "total": found["total"]}}

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return self.summary() | {"figures": self.figures, "findings": [finding.as_dict() for finding in self.findings]}

    def as_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(self.as_dict(), indent=1)


def make(
    path: Path,
    against: Path | None = None,
    *,
    base: Path | None = None,
    base_name: str | None = None,
    max_tokens: int = 2048,
    others: Sequence[Other] = (),
    benchmark_folder: Path | None = None,
    losses: Mapping[int, AnswerLoss] = MappingProxyType({}),
    ask: Ask | None = None,
    columns: Mapping[str, str] | None = None,
    progress: Callable[[float], object] = float,
) -> Report:
    """The report of one file. `against`: a validation or test file; `base`: a folder with tokenizer.json, and with
    figures of tokens where it has a chat template too; `others`: files that the project has besides;
    `benchmark_folder`: the general benchmark's; `losses`: the base's, of the answers by their lines; `ask`: asks a base
    about the ends of some other answers; `columns`: see `FileShape`, of both files if `against` has them; `progress` is
    called with the share that is done.

    Raises InvalidRows where a file's bytes are not rows, NothingToCompare where none of `against` can be read,
    CannotRender where the base has no tokenizer.
    """
    count = length.tokenizer(base) if base else None
    judged = verdict.judge(lambda: readers.chunks_of(path), least=1, columns=columns)
    asked = benchmark.read(benchmark_folder) if benchmark_folder else frozenset()
    rows, known = read(path, MOST, columns), read_other(against, MOST, columns) if against else ()
    case = Case(rows, known, max_tokens, count, others, asked, losses, ask)
    find(case, progress=progress)
    figures: dict[str, Any] = {"diversity": diversity.figures(case), "languages": languages.figures(case)}
    if known:
        figures["against"] = {"rows": len(known), "compared": sum(map(can_be_compared, known))}
    if base is not None and base.is_dir():
        lengths = tokens.Lengths(base, max_tokens)
        lengths.measure(readers.chunks_of(path), MOST, columns)
        figures["tokens"] = lengths.figures(base_name or base.name)
        figures["answers"] = plausibility.figures(losses)
        case.findings.extend(lengths.findings)
    counted = usable.count(case.rows, case.findings)
    return Report(len(case.rows), case.findings, judged, figures, elsewhere.pack(case.rows), counted)


def find(case: Case, checks: Sequence[Check] = CHECKS, progress: Callable[[float], object] = float) -> list[Finding]:
    """Returns what the checks find, in their order, and the rows that a job would refuse for another reason."""
    for done, check in enumerate(checks, 1):
        progress(done / (len(checks) + 1))
        case.findings.extend(check(case))
    named = case.lines_found(*_EXPLAINED)
    case.findings.extend(invalid_row(row.line, row.fault) for row in case.rows if row.fault and row.line not in named)
    return case.findings
