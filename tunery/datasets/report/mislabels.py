"""Finds rows that are probably mislabelled: a classifier that has not seen the row prefers another label.

Ranked by the margin, the given label's probability minus that of the best other one, which separates wrong labels from
hard questions better than the given label's probability alone.
"""

import random
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.pipeline import make_union

from tunery.datasets.report import labels, quotes, spellings, texts
from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.labels import Task
from tunery.datasets.report.rows import Row

_FOLDS, _SEED = 5, 7
_LEAST = 40
"""Minimum rows to learn labels from."""
_FITTED = 2500
"""Maximum rows that a fold's classifier is fitted on. It scores its whole fold."""
_STRENGTH, _STEPS = 2.0, 100
_MANY = 10_000
"""Rows from which words alone are enough, and parts of words would only take time."""
_READ = 1000
"""Characters of a question that are read."""
_AGREEMENT = 0.4
"""Minimum of Cohen's kappa between the labels and those that the classifier prefers."""
_SHOWN = 40
_ACTION = "Check the row, and correct the label if it is wrong."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer is that of another question, the most certain first, without contradictions: those with
    values that only the question of another can have, those with a label in a rare spelling, and those for which the
    classifier prefers another label."""
    named = case.lines_found("contradiction", "wrong_roles", "empty_output", "truncated_output")
    quoted = quotes.find(case)
    absent = {line: found for line, found in quoted.missing.items() if line not in named}
    for line, (fraction, value) in sorted(absent.items(), key=lambda item: -item[1][0]):
        why = f"Has '{value[:_SHOWN]}', which is not in the question, although similar answers quote the question."
        yield Finding("mislabelled", [line], fraction, why, _ACTION)
    named |= absent.keys()
    tasks = [task for task in case.tasks if task.key not in quoted.keys]
    odd = {one.line: one for task in tasks for one in spellings.find(task) if one.line not in named}
    for one in sorted(odd.values(), key=lambda one: -one.score):
        yield Finding("mislabelled", [one.line], one.score, one.why, one.action)
    named |= odd.keys()
    for task in case.tasks:
        rows = [row for row in case.answered if row.line in task.labels]
        if len(rows) < _LEAST or task.key in quoted.keys:
            continue
        given, spelled = [task.labels[row.line] for row in rows], task.spelled()
        margins, better = _margins(rows, given, _trusted(task, case.against))
        if not _are_learnt(given, margins, better):
            continue
        for at in np.argsort(margins):
            if margins[at] < 0 and rows[at].line not in named:
                given_here, others = spelled[given[at]], spelled[better[at]]
                why = f"Has {task.name} '{given_here}', whereas similar rows have '{others}'."
                yield Finding("mislabelled", [rows[at].line], float(-margins[at]), why, _ACTION)


def _are_learnt(given: Sequence[str], margins: NDArray[np.float64], better: Sequence[str]) -> bool:
    """Whether the classifier knows the labels at all, without which what it prefers says nothing of a row."""
    preferred = np.where(margins < 0, better, given)
    return float(cohen_kappa_score(given, preferred)) >= _AGREEMENT


def _trusted(task: Task, against: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns questions and labels of the other file, which every fold is trained on."""
    known = set(task.labels.values())
    read = ((row.question, labels.read(task, row.answer)) for row in against)
    return [(question, label) for question, label in read if label in known]


def _margins(
    rows: Sequence[Row], given: Sequence[str], trusted: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.float64], list[str]]:
    """Returns each row's margin and the best other label, out of fold."""
    table = _table([row.question for row in rows] + [question for question, _ in trusted])
    label = np.array([*given, *(label for _, label in trusted)])
    fold = np.r_[_folds(rows), np.full(len(trusted), _FOLDS)]
    margins, better = np.zeros(len(rows)), [""] * len(rows)
    for at in range(_FOLDS):
        judged = np.flatnonzero(fold == at)
        learned = np.random.default_rng(_SEED).permutation(np.flatnonzero(fold != at))[:_FITTED]
        if len(judged) == 0 or len(set(label[learned])) < 2:
            continue
        model = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=_STEPS)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # the order is right long before
            chances = model.fit(table[learned], label[learned]).predict_proba(table[judged])
        mine = model.classes_[None, :] == label[judged][:, None]
        others = np.where(mine, -1.0, chances)
        margins[judged] = np.where(mine, chances, 0).sum(axis=1) - others.max(axis=1)
        for place, best in zip(judged, others.argmax(axis=1), strict=True):
            better[place] = str(model.classes_[best])
    return margins, better


def _table(questions: Sequence[str]) -> csr_matrix:
    """Returns the TF-IDF matrix of words, pairs of words, and parts of words."""
    many = len(questions) >= _MANY
    kinds = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=3 if many else 1)]
    if not many:
        kinds.append(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=2))
    return csr_matrix(make_union(*kinds).fit_transform([question[:_READ] for question in questions]))


def _folds(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Returns the fold of each row. Rows with the same question share a fold, or each would confirm the other."""
    keys = [texts.words(row.question) for row in rows]
    different = sorted(set(keys))
    random.Random(_SEED).shuffle(different)  # noqa: S311 (shuffles folds)
    fold = {key: at % _FOLDS for at, key in enumerate(different)}
    return np.array([fold[key] for key in keys])
