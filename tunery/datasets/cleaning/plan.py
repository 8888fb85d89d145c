"""Decides what a cleaning does to each row, by the findings of a report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.datasets.cleaning import conversations, redaction, several
from tunery.datasets.cleaning.order import IMPLAUSIBLE, OF_SEVERAL, TRUNCATED, Action, Cleaning
from tunery.datasets.report import maker, mislabels, privacy, roles, texts, truncation
from tunery.datasets.report.case import Ask, Case, Check, Finding
from tunery.datasets.report.rows import Row, of_source
from tunery.rows.formats import SourceRow

CHOSEN = "rows.drop"
"""The kind for rows that a person has chosen to drop."""
_ROUNDS = 5
_FIRST_ROUND, _LATER_ROUND = 0.6, 0.1
"""Shares of the work, for the progress."""
_CERTAIN: list[Check] = [check for check in maker.CHECKS if check is not mislabels.find]
"""Checks of later rounds. Not the classifier's: fitted again, it would doubt further rows in every round."""

ReadRows = Callable[[set[int]], Iterable[SourceRow]]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """Why a row was dropped."""

    line: int
    kind: str
    why: str


@dataclass(frozen=True)
class Changed:
    """A change of a row. `before` shows no redacted value."""

    line: int
    kind: str
    before: str
    after: str


@dataclass
class Plan:
    """The rows to drop and to change, by line, and the remaining rows as a report sees them."""

    rows: list[Row]
    dropped: dict[int, Dropped] = field(default_factory=dict)
    changes: list[Changed] = field(default_factory=list)
    fields: dict[int, Fields] = field(default_factory=dict)

    def drop(self, line: int, kind: str, why: str) -> None:
        self.dropped.setdefault(line, Dropped(line, kind, why))

    def left(self) -> list[Row]:
        return [row for row in self.rows if row.line not in self.dropped]


def make(
    rows: list[Row],
    read_rows: ReadRows,
    order: Cleaning,
    *,
    against: Sequence[Row] = (),
    more: Sequence[Finding] = (),
    known: Sequence[Finding] | None = None,
    ask: Ask | None = None,
    options: Mapping[str, Any],
    progress: Callable[[float], object] = float,
) -> Plan:
    """Checks the rows, acts, and checks the remaining rows again until nothing is left to do: a row with corrected
    roles may be a duplicate of another. `more`: additional findings; `known`: what a base found in the file's report;
    `ask`: asks a base where that is None; `options`: of the report; `progress` is called with the fraction that is
    done."""
    plan = Plan(rows)
    actions = order.chosen()
    asked = ask if TRUNCATED in actions else None
    implausible = [one for one in known or () if one.kind == IMPLAUSIBLE]
    for line in order.rows.drop:
        plan.drop(line, CHOSEN, "Was chosen.")
    for number in range(_ROUNDS if actions else 0):
        case = Case(plan.left(), against, ask=None if number else asked, **options)
        found = maker.find(case, _CERTAIN if number else _first_checks(known), _of_round(number, progress))
        kept = [finding for finding in found if number == 0 or finding.score == 1 or not _is_guess(finding)]
        if not _act(plan, kept if number else [*kept, *more, *implausible], actions, read_rows):
            break
    return plan


def _first_checks(known: Sequence[Finding] | None) -> list[Check]:
    """Returns the report's checks; if it had a base, its truncated answers are not looked for again without one."""
    if known is None:
        return maker.CHECKS
    truncated = [finding for finding in known if finding.kind == TRUNCATED]
    return [(lambda _: truncated) if check is truncation.find else check for check in maker.CHECKS]


def _of_round(number: int, progress: Callable[[float], object]) -> Callable[[float], object]:
    """Shows what share of all a round's share is. The first one takes the longest, and few have all the others."""
    begun = 0.0 if number == 0 else _FIRST_ROUND + (number - 1) * _LATER_ROUND
    return lambda fraction: progress(begun + fraction * (_LATER_ROUND if number else _FIRST_ROUND))


def _is_guess(finding: Finding) -> bool:
    """Whether the finding comes from a classifier, which is fitted to the remaining rows."""
    return finding.kind == TRUNCATED


def _act(plan: Plan, findings: Iterable[Finding], actions: Mapping[str, Action], read_rows: ReadRows) -> bool:
    """Acts on the findings; returns whether anything was done."""
    due = [one for one in findings if one.kind in actions and one.score >= actions[one.kind].min_score]
    before = len(plan.dropped) + len(plan.changes)
    edits: dict[int, list[Finding]] = {}
    for finding in due:
        action = actions[finding.kind].action
        if action in ("fix", "redact"):
            for line in finding.lines:
                edits.setdefault(line, []).append(finding)
        elif action == "drop" and finding.kind not in OF_SEVERAL:
            for line in finding.lines:
                plan.drop(line, finding.kind, finding.why)
    _edit(plan, {line: found for line, found in edits.items() if line not in plan.dropped}, read_rows)
    for line, finding, beside in several.surplus(due, actions, plan.dropped):
        plan.drop(line, finding.kind, f"{finding.why} The other: line {beside}.")
    return len(plan.dropped) + len(plan.changes) > before


def _edit(plan: Plan, edits: Mapping[int, list[Finding]], read_rows: ReadRows) -> None:
    """Changes rows, or drops those that cannot be corrected."""
    if not edits:
        return
    places = {row.line: at for at, row in enumerate(plan.rows)}
    answers = {texts.squash(row.answer) for row in plan.rows if row.line not in edits}
    for source in read_rows(set(edits)):
        source = source._replace(fields=plan.fields.get(source.number, source.fields))
        for finding in edits[source.number]:
            edited = _redact(source) if finding.kind == "pii" else _fix(source, answers)
            if edited is None:
                plan.drop(source.number, finding.kind, f"{finding.why} It cannot be corrected automatically.")
                break
            source, change = edited
            plan.changes.append(change)
        else:
            plan.fields[source.number] = source.load()
            plan.rows[places[source.number]] = of_source(source)


def _redact(source: SourceRow) -> tuple[SourceRow, Changed] | None:
    before = source.load()
    after = redaction.redact(before)
    redacted = source._replace(fields=after)
    row = of_source(redacted)
    # What is left, such as a value in another part than its name, cannot be replaced alone.
    if _personal(row) or (row.fault is not None and of_source(source).fault is None):
        return None
    said = " and ".join(_personal(of_source(source)))
    return redacted, Changed(source.number, "pii", said, redaction.excerpt(before, after))


def _personal(row: Row) -> dict[str, None]:
    """Returns the kinds of personal data in a row's texts."""
    return dict.fromkeys(kind for text in row.texts for kind in privacy.kinds_in(text))


def _fix(source: SourceRow, answers: set[str]) -> tuple[SourceRow, Changed] | None:
    after = conversations.fix(source.load(), answers, source.shape.columns if source.shape else {})
    if after is None:
        return None
    fixed = source._replace(fields=after)
    row = of_source(fixed)
    if row.fault is not None or roles.describe(row.turns) is not None:
        return None
    return fixed, Changed(source.number, "wrong_roles", _roles(of_source(source)), _roles(row))


def _roles(row: Row) -> str:
    return ", ".join(turn.role for turn in row.turns)


def by_kind(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns how many rows were dropped and changed for each kind."""
    counts: dict[str, dict[str, int]] = {}
    for name, entries in (("dropped", plan.dropped.values()), ("changed", plan.changes)):
        for kind in _kinds(entries):
            of_kind = counts.setdefault(kind, {"dropped": 0, "changed": 0})
            of_kind[name] += 1
    return counts


def _kinds(entries: Iterable[Dropped | Changed]) -> Iterator[str]:
    return (entry.kind for entry in entries)
