"""Finds values of JSON answers that their question does not have, where nearly all answers quote the question."""

from collections.abc import Iterator, Mapping
from typing import Any

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case

_LEAST, _SHARE = 40, 0.8
"""Minimum rows with a key, and the share of them whose values have to be quotes. Not nearer to 1, because a file may
have many wrong answers."""


def missing(case: Case) -> dict[int, tuple[float, str]]:
    """Returns by line the share of an answer's quoted values that its question does not have, and the first of them.

    Keys of the answer are judged one by one, with all texts in a nested value. Labels are no quotes.
    """
    labels = {task.key for task in case.tasks}
    found: dict[str, dict[int, list[tuple[str, bool]]]] = {}
    for row in case.answered:
        answer, question = texts.load_json(row.answer), texts.squash(row.question)
        for key, value in answer.items() if isinstance(answer, Mapping) else ():
            if key not in labels and (values := [text for text in map(texts.squash, _texts(value)) if text]):
                found.setdefault(key, {})[row.line] = [(text, text in question) for text in values]
    quoted: dict[int, list[tuple[str, bool]]] = {}
    for by_line in filter(_are_quotes, found.values()):
        for line, some in by_line.items():
            quoted.setdefault(line, []).extend(some)
    absent = {line: [text for text, is_there in some if not is_there] for line, some in quoted.items()}
    return {line: (len(lost) / len(quoted[line]), lost[0]) for line, lost in absent.items() if lost}


def _are_quotes(by_line: Mapping[int, list[tuple[str, bool]]]) -> bool:
    whole = sum(all(is_there for _, is_there in values) for values in by_line.values())
    return len(by_line) >= _LEAST and whole >= _SHARE * len(by_line)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
