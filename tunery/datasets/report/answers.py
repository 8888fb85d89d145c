"""Finds answers that teach nothing: empty ones, repeated questions, and one answer to most questions."""

import re
from collections import Counter
from collections.abc import Iterator

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import PLAIN

_INVISIBLE = re.compile(r"[\s\u200b-\u200d\u2060\ufeff\u00ad]*")
_DOMINANT = 0.2
_IMBALANCE = 20
_LEAST = 20
"""Minimum rows for meaningful shares."""


def find_empty(case: Case) -> Iterator[Finding]:
    """Finds rows with an empty assistant message, and empty plain texts."""
    for row in case.rows:
        learned = [turn for turn in row.turns if turn.role in ("assistant", PLAIN) and not turn.calls]
        if any(_INVISIBLE.fullmatch(turn.text) for turn in learned):
            what = "The text" if row.is_plain else "An assistant message"
            why = f"{what} is empty: the model would learn to write nothing."
            yield Finding("empty_output", [row.line], 1.0, why, "Write the answer, or drop the row.")


def find_echoes(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer repeats the question."""
    for row in case.answered:
        if texts.squash(row.answer) == texts.squash(row.question):
            why = "The answer repeats the question."
            yield Finding("answer_is_prompt", [row.line], 1.0, why, "Correct the answer, or drop the row.")


def find_dominant(case: Case) -> Iterator[Finding]:
    """Finds a free-text answer that a large share of the rows has."""
    labelled = {line for task in case.tasks for line in task.labels}
    free = [row for row in case.answered if row.line not in labelled]
    counts = Counter(texts.squash(row.answer) for row in free)
    for answer, count in counts.most_common(3):
        if count >= _LEAST and count >= _DOMINANT * len(case.answered):
            lines = [row.line for row in free if texts.squash(row.answer) == answer]
            fraction = count / len(case.answered)
            why = f"{fraction:.0%} of the rows have the same answer, '{answer[:40]}'."
            yield Finding(
                "dominant_answer", lines, fraction, why, "Keep fewer of them, so that others are learned too."
            )


def find_imbalance(case: Case) -> Iterator[Finding]:
    """Finds classifications in which one class has many times the rows of another."""
    for task in case.tasks:
        (most, many), *_, (least, few) = Counter(task.labels.values()).most_common()
        if many >= _LEAST and many >= _IMBALANCE * few:
            lines = [line for line, label in task.labels.items() if label == least]
            why = f"Of {task.name}, '{most}' has {many} rows, but '{least}' only {few}."
            yield Finding("label_imbalance", lines, 1 - few / many, why, f"Add rows with '{least}'.")
