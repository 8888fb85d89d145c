"""Detects classification tasks: answers, or fields of JSON answers, with few different values."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunery.datasets.report import texts
from tunery.datasets.report.rows import Row

TEXT = ""
LONGEST = 60
_OFTEN = 3
"""Minimum rows for a value to be a class."""
_COVERED = 0.6
"""Minimum share of rows whose value is a class; below it the values are free text, some of them equal."""
_PER_CLASS = 4
"""Minimum average rows per class."""


@dataclass(frozen=True)
class Task:
    """A classification task: the key in the answer's JSON object, or TEXT for the whole answer, and by line the labels
    and the values of all rows as written, which may be none."""

    key: str
    labels: dict[int, str]
    written: dict[int, str]

    @property
    def name(self) -> str:
        """The name of what holds the label, for use in a sentence."""
        return f"the {self.key}" if self.key else "the answer"

    def spelled(self) -> dict[str, str]:
        """Returns the labels as most rows write them."""
        counts = Counter((label, self.written[line]) for line, label in self.labels.items())
        return {label: value for (label, value), _ in reversed(counts.most_common())}


def find(rows: Sequence[Row]) -> list[Task]:
    """Returns the classifications among `rows`."""
    values: dict[str, dict[int, str]] = {}
    for row in rows:
        for key, value in _values(row.answer).items():
            values.setdefault(key, {})[row.line] = value
    found = (_task(key, by_line) for key, by_line in values.items())
    return [task for task in found if task is not None]


def read(task: Task, answer: str) -> str | None:
    """Returns an answer's label in a task, if it has one."""
    value = _values(answer).get(task.key)
    return None if value is None else texts.squash(value)


def _values(answer: str) -> dict[str, str]:
    parsed = texts.load_json(answer)
    if isinstance(parsed, dict):
        plain = ((key, value) for key, value in parsed.items() if isinstance(value, str | bool | int))
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in plain}
    return {TEXT: answer} if parsed is None and len(texts.squash(answer)) <= LONGEST else {}


def _task(key: str, written: dict[int, str]) -> Task | None:
    by_line = {line: texts.squash(value) for line, value in written.items()}
    counts = Counter(by_line.values())
    classes = {value for value, count in counts.items() if count >= _OFTEN}
    labels = {line: value for line, value in by_line.items() if value in classes}
    enough = len(labels) >= max(_COVERED * len(by_line), _PER_CLASS * len(classes))
    return Task(key, labels, written) if len(classes) >= 2 and enough else None
