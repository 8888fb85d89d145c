"""Chooses the examples before a question: the same balanced ones for all, or each question's nearest."""

import random
from collections.abc import Sequence
from itertools import chain

from tunery.datasets.report import extensions, neighbours, texts
from tunery.datasets.report.rows import Row


def balanced(answers: Sequence[str], seed: int) -> list[int]:
    """Returns the indexes of all answers in a seeded order; any first few are as varied as possible."""
    places = list(range(len(answers)))
    random.Random(seed).shuffle(places)  # noqa: S311 (no secret)
    turns: dict[str, int] = {}
    ranked = []
    for order, place in enumerate(places):
        turn = turns.get(answers[place], 0)
        turns[answers[place]] = turn + 1
        ranked.append((turn, order, place))
    return [place for _, _, place in sorted(ranked)]


def nearest(questions: Sequence[str], examples: Sequence[str], most: int) -> list[list[int]]:
    """The places of the `most` examples that are most like each question, by TF-IDF of their words; the likest last.

    Why last: what stands next to the question weighs most. Of examples that are as like the first one comes first.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    # No pattern of its own: the usual one drops words of one character, which in some scripts are most of them.
    vectors = TfidfVectorizer(token_pattern=texts.WORD.pattern, sublinear_tf=True)
    known = vectors.fit_transform([text or "-" for text in (*examples, *questions)])[: len(examples)]
    found = []
    for question in questions:
        likeness = (known @ vectors.transform([question]).T).toarray()[:, 0]
        first = np.argsort(-likeness, kind="stable")[:most]
        found.append([int(place) for place in first[::-1]])
    return found


def leaked(examples: Sequence[Row], questions: Sequence[Row]) -> set[int]:
    """Returns the lines of examples that ask, or nearly ask, what an eval row asks: a prompt would hold its answer."""
    pairs = chain(neighbours.find(examples, questions), extensions.find(examples, questions))
    return {pair.first.line for pair in pairs if pair.leaked}
