"""Cleans a file: writes a new file and records what was done to each row. The source is only read."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from tunery import digests
from tunery.datasets.cleaning import lines, plan, splits
from tunery.datasets.cleaning.lines import Line
from tunery.datasets.cleaning.order import INVALID, Cleaning, check_other
from tunery.datasets.cleaning.plan import Changed, Dropped, Plan
from tunery.datasets.errors import NothingLeft
from tunery.datasets.report import benchmark, length, maker, tokens
from tunery.datasets.report.case import Ask, Finding
from tunery.datasets.report.elsewhere import Other
from tunery.datasets.report.rows import has_columns, read, read_other
from tunery.errors import InvalidValue
from tunery.rows import readers
from tunery.spec import named_columns


@dataclass(frozen=True)
class Written:
    """A file written by a cleaning."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cleaned:
    """The result of a cleaning. `rows`: of the source; `judged`: those that the report examined; the others are copied
    unchanged. `held_out`: the file of held-out rows, if any."""

    source_sha256: str
    rows: int
    judged: int
    clean: Written
    held_out: Written | None
    actions: list[dict[str, Any]]
    kinds: dict[str, dict[str, int]]
    dropped: list[Dropped] = field(repr=False)
    changed: list[Changed] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the lineage as JSON values."""
        counts = {
            "rows": self.rows,
            "judged": self.judged,
            "kept": self.clean.rows,
            "held_out": self.held_out.rows if self.held_out else 0,
            "dropped": len(self.dropped),
            "changed": len({change.line for change in self.changed}),
        }
        said = asdict(self)
        return {"counts": counts} | {key: said[key] for key in said if key not in ("rows", "judged")}


def clean(
    source: Path,
    target: Path,
    order: Cleaning,
    *,
    held_out: Path | None = None,
    against: Path | None = None,
    base: Path | None = None,
    others: Sequence[Other] | None = None,
    benchmark_folder: Path | None = None,
    known: Sequence[Finding] | None = None,
    ask: Ask | None = None,
    progress: Callable[[float], object] = float,
) -> Cleaned:
    """Writes the remaining rows of `source` to `target` as JSON Lines, and the held-out ones to `held_out`.

    Unchanged rows of JSON Lines are copied byte for byte. What the rows are compared with, and `progress`, are as in a
    report; `others` is None for a file that is not uploaded; `known`: what a base found in the file's report, or None;
    `ask`: as in a report, where that is None. Raises InvalidValue, InvalidRows, NothingToCompare, CannotHoldOut,
    NothingLeft; a partly written file is then left behind.
    """
    digest = digests.sha256(source)
    if against is not None:
        check_other(digest, digests.sha256(against))
    order.check(
        compared=against is not None,
        measured=_has_template(base),
        uploaded=others is not None,
        judged=known is not None,
    )
    options = {
        "max_tokens": order.max_tokens,
        "count": length.tokenizer(base) if base else None,
        "others": others or (),
        "benchmark": benchmark.read(benchmark_folder) if benchmark_folder else frozenset(),
    }
    more = _measure(source, base, order) if _has_template(base) else []
    how = {"more": more, "known": known, "ask": ask, "options": options, "progress": progress}
    made = _plan(source, order, against, how)
    left = made.left()
    apart = splits.hold_out(left, fraction=order.held_out.share, seed=order.held_out.seed) if order.held_out else set()
    with ExitStack() as files:
        outputs = [_Output(files.enter_context(path.open("wb"))) for path in (target, held_out) if path is not None]
        rows, unknown = _write(lines.read_lines(source, named_columns(order.columns)), made, apart, outputs)
    if unknown:
        raise _no_row(source, min(unknown), rows)
    if not outputs[0].rows:
        raise NothingLeft(rows=rows)
    return Cleaned(
        source_sha256=digest,
        rows=rows,
        judged=len(made.rows),
        clean=outputs[0].written(),
        held_out=outputs[1].written() if apart else None,
        actions=[one.model_dump() for one in order.chosen().values()],
        kinds=plan.by_kind(made),
        dropped=sorted(made.dropped.values(), key=lambda one: one.line),
        changed=sorted(made.changes, key=lambda one: one.line),
    )


def _has_template(base: Path | None) -> TypeGuard[Path]:
    """Whether the base is a whole folder and not only its tokenizer.json."""
    return base is not None and base.is_dir()


def _plan(
    source: Path,
    order: Cleaning,
    against: Path | None,
    how: Mapping[str, Any],
) -> Plan:
    columns = named_columns(order.columns)
    rows = read(source, maker.MOST, columns)
    if columns and not has_columns(source, columns):
        raise InvalidValue(param="columns", reason=str(rows[0].fault))
    return plan.make(
        rows,
        lambda numbers: lines.read_rows(source, numbers, columns),
        order,
        against=read_other(against, maker.MOST, columns) if against else (),
        **how,
    )


def _measure(source: Path, base: Path, order: Cleaning) -> list[Finding]:
    """Finds the rows in which the base's tokenizer and template leave nothing, or only part of an answer, to learn."""
    lengths = tokens.Lengths(base, order.max_tokens)
    lengths.measure(readers.chunks_of(source), maker.MOST, named_columns(order.columns))
    return lengths.findings


class _Output:
    """A file being written, with its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.rows = self._bytes = 0

    def write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._digest.update(line + b"\n")
        self.rows, self._bytes = self.rows + 1, self._bytes + len(line) + 1

    def written(self) -> Written:
        return Written(self.rows, self._bytes, self._digest.hexdigest())


def _write(source: Iterator[Line], made: Plan, apart: Collection[int], outputs: list[_Output]) -> tuple[int, set[int]]:
    """Writes the remaining rows, and drops those that cannot be written; returns how many the source has, and the lines
    to drop on which none begins."""
    rows, unknown = 0, set(made.dropped)
    fields: Mapping[int, dict[str, Any]] = made.fields
    for number, line, fault in source:
        rows += 1
        unknown.discard(number)
        if fault is not None:
            made.drop(number, INVALID, fault)
        if number not in made.dropped:
            outputs[number in apart].write(_changed(line, fields[number]) if number in fields else line)
    return rows, unknown


def _changed(line: bytes, fields: dict[str, Any]) -> bytes:
    """Returns the line of a changed row, which ends as it did: a file has one kind of line end."""
    return lines.dump(fields) + (b"\r" if line.endswith(b"\r") else b"")


def _no_row(source: Path, line: int, rows: int) -> InvalidValue:
    """Returns the error for a line to drop on which no row begins: it may be a later one of a row, or the header."""
    numbers = (row.number for row in lines.read_lines(source, {}))
    nearest = min(numbers, key=lambda number: (number > line, abs(number - line)))
    reason = f"The file has {rows:,} rows, but none begins on line {line}; one does on line {nearest}. Correct 'rows'."
    return InvalidValue(param="rows.drop", reason=reason)
