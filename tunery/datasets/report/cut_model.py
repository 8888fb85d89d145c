"""A classifier of truncated answers: trained on a file's answers against the same answers cut inside a word at random,
and out of fold, so that no answer is judged by a model that has seen it.

Why inside a word: answers that were cut after one end as many whole lists, titles and pieces of code do, and learning
from them names those too. The part of a word shows also how an answer that goes on looks besides its last word.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tunery.datasets.report import endings
from tunery.datasets.report.vocabulary import Vocabulary, words

CUTS = 4
"""Cuts made of each answer; one with fewer characters cannot be cut."""
_FOLDS, _ROUNDS, _SEED = 5, 3, 7
"""Rounds are averaged, where answers are few."""
_PENALTY = 10.0
"""Weight of the squared coefficients. There are a hundred features, and often only a hundred answers."""
_FITTED = 2500
_CUT = 0.9
"""Score from which an answer is not used as an example of a whole one."""
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


def score(answers: Sequence[str], questions: Sequence[str], known: Vocabulary) -> NDArray[np.float64]:
    """Returns each answer's score of being truncated, 0 to 1, as if half were; 0 if it does not end with a letter, as
    one that was cut inside a word does. All have at least CUTS characters."""
    texts = _Texts(answers, *([words(text) for text in some] for some in (answers, questions)))
    rounds = range(_ROUNDS if len(answers) <= _FITTED else 1)
    scores = [_score(texts, known, random.Random(_SEED + at)) for at in rounds]  # noqa: S311 (places to cut at)
    return np.asarray(np.mean(scores, axis=0))


def _score(texts: _Texts, known: Vocabulary, dice: random.Random) -> NDArray[np.float64]:
    order = np.array(dice.sample(range(len(texts.answers)), len(texts.answers)))
    learned = order[:_FITTED]
    pieces = [(place, text) for place in learned for text in _cuts(texts.answers[place], dice)]
    scores = np.zeros(len(order))
    if not pieces:
        return scores
    owners = np.array([place for place, _ in pieces])
    cut = _read(texts.cut(owners, [text for _, text in pieces]), known)
    judged = np.array([place for place in order if texts.answers[place].rstrip()[-1].isalpha()], dtype=np.int64)
    described = np.union1d(learned, judged)
    whole = np.zeros((len(order), cut.shape[1]))
    whole[described] = _read(texts.cut(described, [texts.answers[place] for place in described]), known)
    first = np.zeros(len(order))
    first[learned] = _judge(whole, cut, owners, learned, learned)
    # Certainly truncated answers are left out, as they would count as examples of whole ones.
    scores[judged] = _judge(whole, cut, owners, learned[first[learned] < _CUT], judged)
    return scores


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
    """Yields the answer cut inside a word at random places; nothing if it has no word there."""
    places = range(max(1, len(answer) // 5), min(len(answer) - 1, max(1, int(len(answer) * 0.9))) + 1)
    if inside := [at for at in places if answer[at - 1 : at + 1].isalpha()]:
        yield from (answer[: dice.choice(inside)] for _ in range(CUTS))


def _read(texts: _Texts, known: Vocabulary) -> NDArray[np.float64]:
    return np.array([endings.describe(*one, known) for one in zip(*texts, strict=True)])


def _judge(
    whole: NDArray[np.float64],
    cut: NDArray[np.float64],
    owners: NDArray[np.int64],
    learned: NDArray[np.int64],
    judged: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Returns the scores of `judged`, each fold by a model trained on the others."""
    scores = np.zeros(len(judged))
    for fold in range(_FOLDS):
        mine = np.arange(len(judged)) % _FOLDS == fold
        taught = np.setdiff1d(learned, judged[mine])
        pieces = np.isin(owners, taught)
        if mine.any() and pieces.any():
            scores[mine] = _fit(whole[taught], cut[pieces], whole[judged[mine]])
    return scores


def _fit(whole: NDArray[np.float64], cut: NDArray[np.float64], judged: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = StandardScaler()
    table = scale.fit_transform(np.vstack([whole, cut]))
    breaks = np.r_[np.zeros(len(whole)), np.ones(len(cut))]
    weights = np.where(breaks, 1 / CUTS, 1.0)
    model = LogisticRegression(C=1 / _PENALTY, max_iter=500).fit(table, breaks, weights)
    chances: NDArray[np.float64] = model.predict_proba(scale.transform(judged))[:, 1]
    return chances
