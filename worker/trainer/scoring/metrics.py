"""The metrics of a task, chosen by its test rows' wanted answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from worker.trainer.scoring import matching, text
from worker.trainer.scoring.answers import Question

Task = Literal["calls", "json", "labels", "text"]

_LABEL_CHARACTERS, _LABEL_WORDS = 60, 8


@dataclass(frozen=True)
class Metric:
    """A figure from 0 to 1: the sum of `rate`'s first number over all rows, divided by that of its second.

    `is_binary`: each row counts as 0 or 1 of 1.
    """

    name: str
    rate: Callable[[Question, str], tuple[float, float]]
    is_binary: bool = False

    def rates(self, asked: Sequence[Question], answers: Sequence[str]) -> list[tuple[float, float]]:
        """Returns both numbers for each answer."""
        return [self.rate(question, answer) for question, answer in zip(asked, answers, strict=True)]


def figure(rates: Sequence[tuple[float, float]]) -> float:
    """Returns the metric over all rows, from both numbers of each."""
    return sum(part for part, _ in rates) / (sum(whole for _, whole in rates) or 1)


def fraction(name: str, holds: Callable[[Question, str], bool]) -> Metric:
    """Returns a metric: the fraction of rows for which `holds` is true."""
    return Metric(name, lambda question, answer: (float(holds(question, answer)), 1.0), is_binary=True)


def mean(name: str, score: Callable[[Question, str], float]) -> Metric:
    """Returns a metric: the mean of each row's score."""
    return Metric(name, lambda question, answer: (score(question, answer), 1.0))


def _is_exact(question: Question, answer: str) -> bool:
    return matching.matches(question.wanted, answer, is_call=question.is_call)


def _calls_right(question: Question, answer: str) -> bool:
    return matching.calls(answer) == matching.calls(question.wanted)


def _names_right(question: Question, answer: str) -> bool:
    return [name for name, _ in matching.calls(answer)] == [name for name, _ in matching.calls(question.wanted)]


def _is_json(question: Question, answer: str) -> bool:
    return matching.parse_json(_as_wanted(question, answer)) is not None


def _field_overlap(question: Question, answer: str) -> tuple[float, float]:
    wanted, given = (matching.parse_json(_as_wanted(question, found)) for found in (question.wanted, answer))
    first, second = (matching.fields(value) if value is not None else Counter() for value in (wanted, given))
    return 2.0 * (first & second).total(), float(first.total() + second.total())


def _as_wanted(question: Question, answer: str) -> str:
    """Returns the answer without a code fence if the wanted answer has one too."""
    fenced = matching.without_fence(question.wanted) != matching.without_reasoning(question.wanted)
    return matching.without_fence(answer) if fenced else answer


def label(answer: str) -> str:
    """Returns an answer as a label: in lower case, without whitespace, quotes and a full stop around it."""
    words = " ".join(matching.without_reasoning(answer).casefold().split())
    return words.strip(" .!\"'`") or words


EXACT = fraction("exact", _is_exact)
METRICS: dict[Task, tuple[Metric, ...]] = {
    "calls": (fraction("tool_calls", _calls_right), fraction("tool_names", _names_right), EXACT),
    "json": (Metric("field_f1", _field_overlap), fraction("json_valid", _is_json), EXACT),
    "labels": (fraction("label_accuracy", lambda question, answer: label(question.wanted) == label(answer)), EXACT),
    "text": (
        mean("chrf", lambda question, answer: text.chrf(question.wanted, answer)),
        mean("rouge_l", lambda question, answer: text.rouge_l(question.wanted, answer)),
        EXACT,
    ),
}
"""The metrics of each task, the primary one first."""


def detect_task(asked: Sequence[Question]) -> Task | None:
    """Returns what the wanted answers are: tool calls, JSON, labels or free text; None if calls are not written in
    JSON.
    """
    if any(question.is_call for question in asked):
        return "calls" if all(matching.calls(question.wanted) for question in asked if question.is_call) else None
    if all(_is_json(question, question.wanted) for question in asked):
        return "json"
    return "labels" if _are_labels([matching.without_reasoning(question.wanted) for question in asked]) else "text"


def _are_labels(wanted: list[str]) -> bool:
    """Whether the answers are short and most of them occur more than once."""
    short = all(
        len(answer) <= _LABEL_CHARACTERS and len(answer.split()) <= _LABEL_WORDS and "\n" not in answer
        for answer in wanted
    )
    return short and 3 * len(set(map(label, wanted))) <= 2 * len(wanted)


def choose(asked: Sequence[Question]) -> tuple[str, tuple[Metric, ...]]:
    """Returns the task's name and its metrics, the primary one first."""
    task = detect_task(asked)
    return ("other", (EXACT,)) if task is None else (task, METRICS[task])
