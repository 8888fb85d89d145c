"""The input of a report's checks: the rows, and data that several checks share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunery.datasets.report import labels, neighbours
from tunery.datasets.report.labels import Task
from tunery.datasets.report.neighbours import Pair
from tunery.datasets.report.rows import Row
from tunery.rows.answer_losses import AnswerEnd, AnswerLoss

if TYPE_CHECKING:
    from tunery.datasets.report.elsewhere import Other


@dataclass(frozen=True)
class Finding:
    """A finding about some rows. `lines`: their numbers, see `SourceRow`; `against`: those of the other file's rows.
    `score`: confidence from 0 to 1, comparable within a kind. `action`: what to do."""

    kind: str
    lines: list[int]
    score: float
    why: str
    action: str
    against: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding for JSON; without `against` if that is empty."""
        shown = {**asdict(self), "score": round(self.score, 4)}
        return shown if self.against else {key: value for key, value in shown.items() if key != "against"}


def invalid_row(line: int, reason: str) -> Finding:
    """Returns the finding about a row that a job would refuse."""
    return Finding("invalid_row", [line], 1.0, reason, "Correct the row: a job would refuse it.")


class Case:
    """A file, the file that it is compared with, and the findings so far, which later checks may read."""

    def __init__(
        self,
        rows: Sequence[Row],
        against: Sequence[Row] = (),
        max_tokens: int = 2048,
        count: "Counter | None" = None,
        others: "Sequence[Other]" = (),
        benchmark: frozenset[str] = frozenset(),
        losses: Mapping[int, AnswerLoss] = MappingProxyType({}),
        ask: "Ask | None" = None,
    ) -> None:
        """`count`: counts a text's tokens as a base's tokenizer does; None where no base is known. `others`: the other
        files of the project; `benchmark`: the words of the general benchmark's questions; `losses`: what a base said of
        the answers, by line; `ask`: asks a base about the ends of some others."""
        self.rows = rows
        self.against = against
        self.max_tokens = max_tokens
        self.count = count
        self.others, self.benchmark = others, benchmark
        self.losses = losses
        self._ask = ask
        self.findings: list[Finding] = []

    def lines_found(self, *kinds: str) -> set[int]:
        """Returns the rows that earlier findings of these kinds name."""
        return {line for finding in self.findings if finding.kind in kinds for line in finding.lines}

    def ends(self, rows: Sequence[Row]) -> Mapping[int, AnswerEnd]:
        """Returns what a base says of the ends of these rows' answers, by line; not of all if it takes too long."""
        known = {row.line: self.losses[row.line] for row in rows if row.line in self.losses}
        rest = [row for row in rows if row.line not in known]
        return {**known, **self._ask(rest)} if self._ask and rest else known

    @cached_property
    def answered(self) -> list[Row]:
        """The rows with a question and a text answer."""
        return [row for row in self.rows if row.question.strip() and row.answer.strip()]

    @cached_property
    def compared(self) -> list[Row]:
        """The rows that are compared with others by their questions, which plain texts are as a whole."""
        return [row for row in self.rows if row.question.strip() and (row.answer.strip() or row.is_plain)]

    @cached_property
    def tasks(self) -> list[Task]:
        """The classification tasks in the rows."""
        return labels.find(self.answered)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs of rows with equal or similar questions, one from the file, the other from either file."""
        return neighbours.find(self.compared, [row for row in self.against if row.question.strip()])


Counter = Callable[[str], int]
Ask = Callable[[Sequence[Row]], Mapping[int, AnswerEnd]]
Check = Callable[[Case], Iterable[Finding]]
