"""Finds truncated answers: JSON by its syntax, free text by a classifier of how the file's answers end."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tunery.datasets.report import cut_model, dictionary, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.cut_model import Floats
from tunery.datasets.report.endings import ITEM
from tunery.datasets.report.rows import Row
from tunery.datasets.report.vocabulary import Vocabulary
from tunery.rows.answer_losses import AnswerEnd

_SURE = 0.25
_MOST_ODDS, _SURE_ODDS = 1000.0, 100.0
_BLANK = 0.05
"""Share of answers with blanks at their end below which these are a sign of a cut, and no habit of the file."""
_LEAST = 30
_DOUBTFUL = 0.02, 0.95
"""Probabilities of a cut between which a base is asked."""
_WEIGHT, _USUAL_END = 0.5, -4.0
"""The weight of a base's log odds, and the usual lower bound of the log probability of an end after a whole answer."""
_UNMARKED, _MOST_UNMARKED = re.compile(r"[\u0e00-\u0eff]\s*\Z"), 0.5
"""An end in Thai or Lao, whose sentences have no mark there, and the share of the answers from which on a file is
written so: in a file with other languages, each looks as if it broke off."""
_PLACES = 55.0
"""How much less likely a cut at one place is than a cut anywhere: an answer has many places."""
_MARKER = re.compile(r"\s*(?:[-+*•]|\d+[.)-]?)\s*")
_OPEN = {"(": ")", "[": "]", "{": "}"}
_ACTION = "Complete the answer, or drop the row."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer is incomplete JSON, the beginning of a label, or truncated text."""
    named = case.lines_found("wrong_roles")
    rows = [row for row in case.answered if not row.turns[-1].calls and row.line not in named]
    cut = {row.line: why for row in rows if (why := _broken_off(row.answer) or _part_of_label(case, row))}
    for line, why in cut.items():
        yield Finding("truncated_output", [line], 1.0, why, _ACTION)
    judged = cut.keys() | {line for task in case.tasks for line in task.labels}
    free = [row for row in rows if row.line not in judged and texts.load_json(row.answer) is None]
    free = [row for row in free if len(row.answer.strip()) >= cut_model.SHORTEST]  # others cannot be cut to learn from
    unmarked = {row.line for row in free if _UNMARKED.search(row.answer)}
    if len(unmarked) < _MOST_UNMARKED * len(free):
        free = [row for row in free if row.line not in unmarked]
    if len(free) < _LEAST:
        return
    often = Counter(texts.squash(row.answer) for row in free)
    blank = {row.line for row, is_blank in zip(free, _blanks(free), strict=True) if is_blank}
    for row, chance in zip(free, _chances(case, free), strict=True):
        if chance >= _SURE and often[texts.squash(row.answer)] == 1:
            said = "Ends with white space, as few answers do" if row.line in blank else "Breaks off"
            why = f"{said}: '{row.answer.rstrip()[-30:]}'."
            yield Finding("truncated_output", [row.line], float(chance), why, _ACTION)


def _chances(case: Case, free: Sequence[Row]) -> Floats:
    """Returns the probability that each answer is truncated, using a base's probability of its end if available."""
    lines = {row.line for row in free}
    others = (text for row in case.rows if row.line not in lines for text in (row.question, row.answer))
    known = Vocabulary(free, dictionary.of(row.answer for row in free), others)
    odds = np.clip(cut_model.odds(free, known), 0, _MOST_ODDS)
    odds[:, cut_model.AFTER] = np.where(_blanks(free), _SURE_ODDS, odds[:, cut_model.AFTER])
    least, most = _DOUBTFUL
    doubtful = [row for row, one in zip(free, cut_model.calibrate(odds), strict=True) if least < one < most]
    return cut_model.calibrate(_by_base(odds, free, case.ends(doubtful)))


def _blanks(free: Sequence[Row]) -> NDArray[np.bool_]:
    """Returns whether each answer ends with blanks where few answers do."""
    blanks = np.array([row.answer != row.answer.rstrip() for row in free])
    return np.asarray(blanks & (blanks.mean() <= _BLANK))


def _by_base(odds: Floats, free: Sequence[Row], ends: Mapping[int, AnswerEnd]) -> Floats:
    """Returns the answers' odds, as the mean with those of a base where it says something."""
    found = odds.copy()
    for at, row in enumerate(free):
        if (said := ends.get(row.line)) is None:
            continue
        rather = math.exp(_WEIGHT * (_USUAL_END - said.end))
        found[at, cut_model.AFTER] *= rather
        if said.goes_on is None:
            found[at, cut_model.INSIDE] *= rather
        else:
            found[at, cut_model.INSIDE] = (odds[at, cut_model.INSIDE] * math.exp(said.goes_on) / _PLACES) ** _WEIGHT
    return np.clip(found, 0, _MOST_ODDS)


def _broken_off(answer: str) -> str | None:
    """Returns why an answer that begins as JSON, or has a code block, is incomplete; else None."""
    text = answer.strip()
    if text.startswith(("{", "[")) and texts.load_json(text) is None and _open_at_end(text):
        return "Starts as JSON but is incomplete."
    if text.count("```") % 2:
        return "Opens a code block and does not close it."
    *before, last = [line for line in text.split("\n") if line.strip()] or [""]
    if _MARKER.fullmatch(last) and any(map(ITEM.match, before)):
        return "Ends with a list marker."
    return None


def _open_at_end(text: str) -> bool:
    """Whether a string, an object or a list of JSON is open where the text ends."""
    closing: list[str] = []
    quoted = False
    for match in re.finditer(r'\\.|["{}\[\]]', text, re.DOTALL):
        mark = match[0]
        if mark == '"':
            quoted = not quoted
        elif not quoted and mark in _OPEN:
            closing.append(_OPEN[mark])
        elif not quoted and closing and mark == closing[-1]:
            closing.pop()
    return quoted or bool(closing)


def _part_of_label(case: Case, row: Row) -> str | None:
    answer = texts.squash(row.answer)
    for task in case.tasks if not answer.isdecimal() else ():  # 2 is no part of 26
        if not task.key and row.line not in task.labels:
            whole = next((label for label in set(task.labels.values()) if label.startswith(answer)), None)
            if whole is not None:
                return f"Is only the beginning of the label '{whole}'."
    return None
