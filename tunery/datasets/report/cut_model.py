"""A classifier of truncated answers: trained on a file's answers against the same answers cut at random places, and
out of fold, so that no answer is judged by a model that has seen it."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tunery.datasets.report import endings
from tunery.datasets.report.vocabulary import Vocabulary, words

CUTS = 4
"""Cuts made of each answer; one with fewer characters cannot be cut."""
_FOLDS, _ROUNDS, _SEED = 5, 2, 7
_FITTED = 2500
_CUT = 0.9
"""Score from which an answer is not used as an example of a whole one."""
_TAIL = 24
"""Last characters of an answer that are features."""
_RARE, _COMMON, _STEPS = 0.05, 0.5, 100
"""Bounds of the estimated share of truncated answers (so that a single one is found too), and steps to estimate it."""


class _Texts(NamedTuple):
    """Answers with their words and those of their questions."""

    answers: Sequence[str]
    own: Sequence[Sequence[str]]
    asked: Sequence[Sequence[str]]

    def cut(self, owners: NDArray[np.int64], pieces: Sequence[str]) -> Self:
        """Returns parts of these answers."""
        return self._replace(
            answers=pieces, own=[self.own[at] for at in owners], asked=[self.asked[at] for at in owners]
        )


class _Ends(NamedTuple):
    """Features of the answers' ends: figures and the last characters of each."""

    figures: NDArray[np.float64]
    tails: NDArray[np.str_]

    def take(self, places: NDArray[np.int64]) -> "_Ends":
        return _Ends(self.figures[places], self.tails[places])


def score(answers: Sequence[str], questions: Sequence[str], known: Vocabulary) -> NDArray[np.float64]:
    """Returns each answer's score of being truncated, 0 to 1, as if half were. All have at least CUTS characters."""
    texts = _Texts(answers, *([words(text) for text in some] for some in (answers, questions)))
    ends, rounds = _read(texts, known), range(_ROUNDS)
    scores = [_score(texts, ends, known, random.Random(_SEED + at)) for at in rounds]  # noqa: S311 (places to cut at)
    return np.asarray(np.mean(scores, axis=0))


def _score(texts: _Texts, whole: _Ends, known: Vocabulary, dice: random.Random) -> NDArray[np.float64]:
    order = np.array(dice.sample(range(len(texts.answers)), len(texts.answers)))
    learned = order[:_FITTED]
    pieces = [(place, text) for place in learned for text in _cuts(texts.answers[place], dice)]
    owners = np.array([place for place, _ in pieces])
    cut = _read(texts.cut(owners, [text for _, text in pieces]), known)
    first = _judge(whole, cut, owners, learned, learned)
    # Certainly truncated answers are left out, as they would count as examples of whole ones.
    return _judge(whole, cut, owners, learned[first < _CUT], order)[np.argsort(order)]


def calibrate(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the probability that each answer is truncated, from its odds if half of all were. The actual share is
    estimated by expectation-maximisation (Saerens et al. 2002)."""
    fraction = _COMMON
    for _ in range(_STEPS):
        fraction = float(np.clip((fraction * ratios / (fraction * ratios + 1 - fraction)).mean(), _RARE, _COMMON))
    return fraction * ratios / (fraction * ratios + 1 - fraction)


def odds(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the odds of probabilities, all of them finite."""
    bounded = np.clip(chances, 1e-4, 1 - 1e-4)
    return np.asarray(bounded / (1 - bounded))


def _cuts(answer: str, dice: random.Random) -> Iterator[str]:
    """Yields the answer cut at random places."""
    for _ in range(CUTS if len(answer) >= CUTS else 0):
        text = answer[: dice.randint(max(1, len(answer) // 5), max(1, int(len(answer) * 0.9)))]
        if text.strip():
            yield text


def _read(texts: _Texts, known: Vocabulary) -> _Ends:
    tails = np.array([f"{answer.rstrip()[-_TAIL:]}\x03" for answer in texts.answers])
    return _Ends(np.array([endings.describe(*one, known) for one in zip(*texts, strict=True)]), tails)


def _judge(
    whole: _Ends, cut: _Ends, owners: NDArray[np.int64], learned: NDArray[np.int64], judged: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Returns the scores of `judged`, each fold by a model trained on the others."""
    scores = np.zeros(len(judged))
    for fold in range(_FOLDS):
        mine = np.arange(len(judged)) % _FOLDS == fold
        taught = np.setdiff1d(learned, judged[mine])
        scores[mine] = _fit(
            whole.take(taught), cut.take(np.flatnonzero(np.isin(owners, taught))), whole.take(judged[mine])
        )
    return scores


def _fit(whole: _Ends, cut: _Ends, judged: _Ends) -> NDArray[np.float64]:
    scale, tails = StandardScaler(), TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, lowercase=False)
    figures, last = np.vstack([whole.figures, cut.figures]), [*whole.tails, *cut.tails]
    table = hstack([csr_matrix(scale.fit_transform(figures)), tails.fit_transform(last)])
    breaks = np.r_[np.zeros(len(whole.tails)), np.ones(len(cut.tails))]
    weights = np.where(breaks, 1 / CUTS, 1.0)
    model = LogisticRegression(max_iter=500).fit(table, breaks, weights)
    table = hstack([csr_matrix(scale.transform(judged.figures)), tails.transform(judged.tails)])
    chances: NDArray[np.float64] = model.predict_proba(table)[:, 1]
    return chances
