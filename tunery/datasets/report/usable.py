"""Counts a file's usable rows: those without a finding against them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tunery.datasets.cleaning.order import OF_SEVERAL, Action, Cleaning
from tunery.datasets.cleaning.several import surplus
from tunery.datasets.report.case import Finding
from tunery.datasets.report.rows import Row

_BESIDE: Mapping[str, Action] = {"refusal": Action(kind="refusal", action="drop")}
"""Kinds that count though a cleaning only asks about them."""
_KEPT = ("redact",)
"""Actions after which a row is still there."""


def left_out(findings: Sequence[Finding]) -> dict[int, str]:
    """Returns the rows that do not count, by line, each with the kind of its first finding.

    They are those that a cleaning drops as the report recommends, those whose roles it would have to correct, and
    those whose answer refuses.
    """
    actions = {**Cleaning(recommended=True).chosen(), **_BESIDE}
    due = [
        finding
        for finding in findings
        if (action := actions.get(finding.kind)) and action.action not in _KEPT and finding.score >= action.min_score
    ]
    out: dict[int, str] = {}
    for finding in due:
        if finding.kind not in OF_SEVERAL:
            out.update({line: finding.kind for line in finding.lines if line not in out})
    for line, finding, _ in surplus(due, actions, out):
        out.setdefault(line, finding.kind)
    return out


def count(rows: Sequence[Row], findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns how many rows count, how many of each kind do not, and the bytes that a model learns of those that do."""
    out = left_out(findings)
    kept = [row for row in rows if row.line not in out]
    return {
        "rows": len(kept),
        "left_out": dict(Counter(out.values()).most_common()),
        "answer_bytes": sum(row.learned_bytes for row in kept),
    }
