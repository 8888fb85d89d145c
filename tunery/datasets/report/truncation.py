"""Answers that end before they are finished.

JSON says so itself. Of free text a classifier learns how the file's answers end: against the same answers cut at random
places, and out of fold, so that no answer is judged by itself.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import Row

_SURE, _VERY_SURE = 0.7, 0.97
_FOLDS, _ROUNDS, _SEED = 5, 2, 7
_CUTS = 4
_LEAST = 30
_FITTED = 2000
_FEW = 3
_WEIGHT, _USUAL_END, _NO_END = 0.5, -5.0, -9.0
"""Log probabilities of an end behind an answer: whole ones mostly have more than the second, cut ones less than the
third."""
_COMMON = 100
_PROSE = 0.15
_PART = 3
_GOES_ON = ",:;([{-/=+*&"
_TAIL = 24
"""Characters of an answer's end that are read as they are."""
_WORD = re.compile(r"\w+")
_ENDING = re.compile(r"(\w+)(?=[.!?]\s|[^\w\n]*\n)")
_ITEM = re.compile(r"\s*(?:[-+*•]|\d+[.)-])")
_MARKER = re.compile(r"\s*(?:[-+*•]|\d+[.)-]?)\s*")
_FINISHED = ".!?"
_CLOSED = _FINISHED + "\"'\u201d\u2019)]}`\u00bb\u2026"
_OPEN = {"(": ")", "[": "]", "{": "}"}
_ACTION = "Complete the answer, or drop the row."


def find(case: Case) -> Iterator[Finding]:
    """Rows whose answer is JSON without its end, the beginning of a label, or text that breaks off."""
    named = case.lines_found("wrong_roles")
    rows = [row for row in case.answered if not row.turns[-1].calls and row.line not in named]
    cut = {row.line: why for row in rows if (why := _broken_off(row.answer) or _part_of_label(case, row))}
    for line, why in cut.items():
        yield Finding("truncated_output", [line], 1.0, why, _ACTION)
    judged = cut.keys() | {line for task in case.tasks for line in task.labels}
    free = [row for row in rows if row.line not in judged and texts.load_json(row.answer) is None]
    free = [row for row in free if len(row.answer.strip()) >= _CUTS]  # others cannot be cut to learn from
    if len(free) < _LEAST:
        return
    known = Vocabulary(text for row in case.rows for text in (row.question, row.answer))
    often = Counter(texts.squash(row.answer) for row in free)
    for row, score in zip(free, _score(free, known), strict=True):
        part, loss = known.is_part(row), case.losses.get(row.line)
        score = score if loss is None else _with_end(float(score), loss.end)
        may_be_whole = known.may_be_whole(row.answer) and score < _VERY_SURE and (loss is None or loss.end > _NO_END)
        is_free = part or (often[texts.squash(row.answer)] == 1 and not may_be_whole)
        if is_free and (score >= _SURE or part):
            why = f"Breaks off: '{row.answer.rstrip()[-30:]}'."
            yield Finding("truncated_output", [row.line], max(float(score), part * _SURE), why, _ACTION)


def _with_end(score: float, end: float) -> float:
    """The score of a text that breaks off, with what a base says: `end` is the log probability that it ends there."""
    odds = float(np.log(max(score, 1e-6) / max(1 - score, 1e-6))) + _WEIGHT * (_USUAL_END - end)
    return float(1 / (1 + np.exp(-odds)))


def _broken_off(answer: str) -> str | None:
    """Why an answer that begins as JSON, or holds a block of code, has no end."""
    text = answer.strip()
    if text.startswith(("{", "[")) and texts.load_json(text) is None and _open_at_end(text):
        return "Begins as JSON and ends inside it."
    if text.count("```") % 2:
        return "A block of code is opened and not closed."
    *before, last = [line for line in text.split("\n") if line.strip()] or [""]
    if _MARKER.fullmatch(last) and any(map(_ITEM.match, before)):
        return "Ends with the mark of a list's item."
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
    for task in case.tasks:
        if not task.key and row.line not in task.labels:
            whole = next((label for label in set(task.labels.values()) if label.startswith(answer)), None)
            if whole is not None:
                return f"Is the beginning of the label '{whole}'."
    return None


def _score(rows: Sequence[Row], known: "Vocabulary") -> NDArray[np.float64]:
    """How much each answer looks as if it broke off, 0 to 1, out of fold."""
    dice = random.Random(_SEED)  # noqa: S311 (draws places to cut at)
    scores = np.zeros(len(rows))
    for _ in range(_ROUNDS):
        order = dice.sample(range(len(rows)), len(rows))
        for fold in range(_FOLDS):
            judged = order[fold::_FOLDS]
            learned = _others(order, fold)[:_FITTED]
            scores[judged] += _fit_and_judge(rows, learned, judged, known, dice)
    return scores / _ROUNDS


def _others(order: Sequence[int], fold: int) -> list[int]:
    return [at for place, at in enumerate(order) if place % _FOLDS != fold]


def _fit_and_judge(
    rows: Sequence[Row], learned: Sequence[int], judged: Sequence[int], known: "Vocabulary", dice: random.Random
) -> NDArray[np.float64]:
    whole = [rows[at].answer for at in learned]
    cut = [text for answer in whole for text in _cuts(answer, dice)]
    weights = np.r_[np.ones(len(whole)), np.full(len(cut), 1 / _CUTS)]
    scale, tails = StandardScaler(), TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, lowercase=False)
    features = [_features(text, known) for text in whole + cut]
    table = hstack([csr_matrix(scale.fit_transform(features)), tails.fit_transform(map(_tail, whole + cut))])
    model = LogisticRegression(max_iter=500).fit(table, np.r_[np.zeros(len(whole)), np.ones(len(cut))], weights)
    texts_judged = [rows[at].answer for at in judged]
    features = [_features(text, known) for text in texts_judged]
    table = hstack([csr_matrix(scale.transform(features)), tails.transform(map(_tail, texts_judged))])
    chances: NDArray[np.float64] = model.predict_proba(table)[:, 1]
    return chances


def _cuts(answer: str, dice: random.Random) -> Iterator[str]:
    """The answer cut at random places."""
    for _ in range(_CUTS if len(answer) >= _CUTS else 0):
        text = answer[: dice.randint(max(1, len(answer) // 5), max(1, int(len(answer) * 0.9)))]
        if text.strip():
            yield text


def _tail(answer: str) -> str:
    return f"{answer.rstrip()[-_TAIL:]}\x03"


def _features(answer: str, known: "Vocabulary") -> list[float]:
    """What is said about an answer's end besides its characters: its last word, marks left open, how lines end."""
    text = answer.rstrip()
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    last, found = lines[-1], _WORD.findall(text.casefold())
    word = found[-1] if found and text[-1].isalnum() else ""
    sentences = len(re.findall(r"[.!?]\s", text))
    finished = float(np.mean([line[-1] in _FINISHED for line in lines[:-1]])) if len(lines) > 1 else 0.5
    listed = bool(_ITEM.match(last)) and len(lines) > 1
    prose = known.prose(found)
    open_end = text[-1] not in _CLOSED
    return [
        *(prose, prose * open_end, (1 - prose) * open_end, prose * (len(lines) == 1) * open_end),
        *(text.count(",") / max(1, len(found)) * open_end, bool(set(text) & set("=+*/\\<>|^")) * open_end),
        *(text[-1] in _FINISHED, text[-1] in _CLOSED, text[-1].isalpha(), text[-1].isdigit(), text != answer),
        text[-1] in ",:;([{-—/=+*",
        *known.describe(word),
        *(text.count(opened) > text.count(closed) for opened, closed in _OPEN.items()),
        text.count('"') % 2,
        *(sentences > 0, float(np.log1p(sentences)), sentences > 0 and text[-1] not in _CLOSED),
        *(finished, finished * (text[-1] not in _FINISHED)),
        *(listed, listed and finished < 0.5, listed and finished < 0.5 and text[-1] not in _FINISHED),
        *(float(np.log1p(len(text))), float(np.log1p(len(last))), float(np.log1p(len(lines)))),
        *(len(_WORD.findall(last)) <= 3, len(word), len(found) <= 6, len(found) <= 2),
    ]


class Vocabulary:
    """The words of a file: in how many texts each stands, how often it ends a line or sentence, and what begins it."""

    def __init__(self, all_texts: Iterable[str]) -> None:
        self._texts: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        for text in all_texts:
            folded = text.casefold()
            found = _WORD.findall(folded)
            self._texts.update(set(found))
            self._all.update(found)
            # An end of the whole text is left out: it may be a cut.
            self._ends.update(_ENDING.findall(folded))
        self._common = {word for word, _ in self._texts.most_common(_COMMON) if not word.isdigit()}
        often = (word for word, count in self._texts.items() if count > 1)
        self._beginnings = {word[:size] for word in often for size in range(1, len(word))}

    def prose(self, words: Sequence[str]) -> float:
        """The share of words that are among the file's most common: high in sentences, low in lists, code and sums."""
        return sum(word in self._common for word in words) / len(words) if words else 0.0

    def may_be_whole(self, answer: str) -> bool:
        """Whether an answer is too short to tell: a name, a number or a title, whose last word begins no other one."""
        found = _WORD.findall(answer.casefold())
        part = bool(found) and found[-1] in self._beginnings and not self._ends[found[-1]]
        is_plain = self.prose(found) < _PROSE and answer.rstrip()[-1] not in _GOES_ON
        return (len(found) <= _FEW or is_plain) and not part

    def is_part(self, row: Row) -> bool:
        """Whether an answer's last word stands nowhere else in the file and begins a word of its own row."""
        answer = row.answer.rstrip().casefold()
        found = _WORD.findall(answer)
        if not found or not answer[-1].isalpha() or self._all[found[-1]] > 1:
            return False
        there = {*found[:-1], *_WORD.findall(row.question.casefold())}
        return len(found[-1]) >= _PART and any(word.startswith(found[-1]) and word != found[-1] for word in there)

    def describe(self, word: str) -> list[float]:
        """How much a word, the last of an answer, looks like part of another one or of a sentence that goes on."""
        if not word or word.isdigit():
            return [0.0, 0.0, 6.0, 0.0, 0.0, -1.0]
        count, ends = self._all[word], self._ends[word]
        rare, begins = self._texts[word] <= 1, word in self._beginnings
        ending = float(np.log((ends + 0.5) / (count + 4)))
        return [rare, self._texts[word] <= 3, float(np.log1p(count)), rare and begins, rare and not begins, ending]
