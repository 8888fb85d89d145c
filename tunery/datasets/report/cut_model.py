"""A classifier of truncated answers: trained on a file's answers against the same answers cut at random places, and out
of fold, so that no answer is judged by a model that has seen it.

There are three classes: whole, cut inside a word, and cut after one. Whole lists, titles and pieces of code end much as
answers that were cut after a word do. So the share of each class in the file is estimated: where few answers were cut
after a word, it takes more to name one. A few hundred answers teach little about a hundred features: the log odds by
a model of public data sets (`cut_prior.json`, by `bench/cut_prior.py`) are two more, with a smaller penalty.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tunery.datasets.report import endings
from tunery.datasets.report.rows import Row
from tunery.datasets.report.vocabulary import Vocabulary

WHOLE, INSIDE, AFTER = range(3)
CUTS = 3
"""Cuts of each kind made of each answer."""
SHORTEST = 4
"""Characters of the shortest answer that can be cut."""
_FOLDS, _ROUNDS, _SEED = 5, 3, 7
"""Rounds are averaged, where answers are few."""
_LEAST_ODDS = 1e-6
_PENALTY = 100.0
"""Weight of the squared coefficients."""
_PRIOR = 2.0
"""Factor of the log odds by public data sets: the penalty of their coefficients is smaller by its square."""
_FITTED = 1500
"""Answers that are learned from."""
EXTREME = 5.0
"""Bound of standardised features."""
_CERTAIN = 10.0
"""Odds from which an answer is not used as an example of a whole one."""
_LEAST, _MOST = np.array([0.5, 0.01, 0.005]), np.array([0.985, 0.5, 0.5])
"""Bounds of the estimated share of each class, so that a single truncated answer is found too."""
_STEPS = 100

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ends:
    """Ends of answers: their features, the log odds by public data sets, their classes, and whose ends they are."""

    table: Floats
    prior: Floats
    kinds: NDArray[np.int64]
    owners: NDArray[np.int64]

    def at(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "Ends":
        """Returns the chosen ones."""
        return Ends(self.table[chosen], self.prior[chosen], self.kinds[chosen], self.owners[chosen])

    def whole_of(self, owners: Sequence[int]) -> "Ends":
        """Returns the ends of these answers as they are, in this order."""
        place = {owner: at for at, owner in enumerate(self.owners) if self.kinds[at] == WHOLE}
        return self.at(np.array([place[owner] for owner in owners]))


def odds(rows: Sequence[Row], known: Vocabulary) -> Floats:
    """Returns each answer's odds of being whole, cut inside a word and cut after one, if the three were as frequent.
    All answers have at least SHORTEST characters."""
    rounds = range(_ROUNDS if len(rows) <= _FITTED else 1)
    found = [_odds(rows, known, random.Random(_SEED + at)) for at in rounds]  # noqa: S311 (places to cut at)
    return np.asarray(np.exp(np.mean(np.log(np.clip(found, _LEAST_ODDS, None)), axis=0)))


def _odds(rows: Sequence[Row], known: Vocabulary, dice: random.Random) -> Floats:
    order = dice.sample(range(len(rows)), len(rows))
    learned = order[:_FITTED]
    found = np.tile([1.0, 0.0, 0.0], (len(rows), 1))
    parts = read(rows, learned, known, dice)
    if set(parts.kinds) != {WHOLE, INSIDE, AFTER}:
        return found
    # Certainly truncated answers are left out, as they would count as examples of whole ones.
    first = _judge(parts, parts.whole_of(learned))
    certain = [at for at, odd in zip(learned, first, strict=True) if odd[INSIDE] + odd[AFTER] > _CERTAIN]
    taught = parts.at((parts.kinds != WHOLE) | ~np.isin(parts.owners, certain))
    # An answer that is finished is not judged, as it looks like a short one.
    inner, rest = (
        [at for at in some if not endings.is_finished(rows[at].answer)] for some in (learned, order[_FITTED:])
    )
    if inner:
        found[inner] = _judge(taught, parts.whole_of(inner))
    if rest:
        found[rest] = _fit(taught, read(rows, rest, known))
    return found


def read(rows: Sequence[Row], chosen: Sequence[int], known: Vocabulary, dice: random.Random | None = None) -> Ends:
    """Returns the ends of the chosen answers, and with `dice` those of parts of them too."""
    kinds, owners, found = [], [], []
    for at in chosen:
        row, own = rows[at], known.own(at, rows[at].answer)
        for kind, text in [(WHOLE, row.answer), *(cuts(row.answer, dice) if dice else ())]:
            found.append(endings.describe(text, row.question, own, known))
            kinds.append(kind)
            owners.append(at)
    table = np.array([list(features.values()) for features in found])
    return Ends(table, _by_prior(table, list(found[0])) if found else table, np.array(kinds), np.array(owners))


def cuts(answer: str, dice: random.Random) -> Iterator[tuple[int, str]]:
    """Yields the answer cut at random places inside words, and after words or signs."""
    places = range(max(1, len(answer) // 5), min(len(answer), max(1, int(len(answer) * 0.9)) + 1))
    inside = [at for at in places if answer[at - 1 : at + 1].isalpha()]
    after = [at for at in places if not answer[at - 1].isspace() and not answer[at - 1 : at + 1].isalnum()]
    for kind, some in ((INSIDE, inside), (AFTER, after)):
        yield from ((kind, answer[: dice.choice(some)]) for _ in range(CUTS if some else 0))


def calibrate(odds: Floats) -> Floats:
    """Returns the probability that each answer is truncated, from odds as if all classes were equally frequent. The
    actual shares are estimated by expectation-maximisation (Saerens et al. 2002)."""
    shares = _LEAST + (1 - _LEAST.sum()) / len(_LEAST)
    for _ in range(_STEPS):
        weighted = odds * shares
        shares = np.clip((weighted / weighted.sum(1, keepdims=True)).mean(0), _LEAST, _MOST)
        shares /= shares.sum()
    weighted = odds * shares
    return np.asarray(1 - weighted[:, WHOLE] / weighted.sum(1))


def _judge(taught: Ends, judged: Ends) -> Floats:
    """Returns the odds of `judged`, each fold by models trained on other answers."""
    odds = np.empty((len(judged.owners), 3))
    fold_of = np.arange(len(odds)) % _FOLDS
    for fold in set(fold_of):
        mine = judged.at(fold_of == fold)
        odds[fold_of == fold] = _fit(taught.at(~np.isin(taught.owners, mine.owners)), mine)
    return odds


def _fit(taught: Ends, judged: Ends) -> Floats:
    """Returns the odds of `judged` by one model of each kind of cuts against whole answers."""
    scale = StandardScaler().fit(taught.table)
    tables = [np.hstack([_bounded(scale.transform(ends.table)), _PRIOR * ends.prior]) for ends in (taught, judged)]
    log_odds = [_log_odds(taught.kinds, kind, *tables) for kind in (INSIDE, AFTER)]
    return np.column_stack([np.ones(len(judged.owners)), *np.exp(log_odds)])


def _log_odds(kinds: NDArray[np.int64], kind: int, taught: Floats, judged: Floats) -> Floats:
    """Returns the log odds of one kind of cuts, if whole answers were as frequent."""
    cut, whole = kinds == kind, kinds == WHOLE
    if not cut.any() or not whole.any():
        return np.full(len(judged), -np.inf)
    weights = np.where(cut, whole.sum() / cut.sum(), 1.0)
    model = LogisticRegression(C=1 / _PENALTY, solver="newton-cholesky")
    model.fit(taught[cut | whole], cut[cut | whole], weights[cut | whole])
    return np.asarray(model.decision_function(judged))


def _bounded(table: Floats) -> Floats:
    return np.clip(table, -EXTREME, EXTREME)


def _by_prior(table: Floats, names: Sequence[str]) -> Floats:
    """Returns the log odds of both kinds of cuts by the model of public data sets."""
    prior = _prior()
    mean, scale, *coefficients = np.array([prior["features"][name] for name in names]).T
    return np.asarray(_bounded((table - mean) / scale) @ np.array(coefficients).T + prior["intercepts"])


@cache
def _prior() -> Mapping[str, Any]:
    path = resources.files("tunery.datasets.report") / "cut_prior.json"
    prior: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return prior
