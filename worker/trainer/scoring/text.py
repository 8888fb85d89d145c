"""Measures how close a free text is to the wanted one, from 0 to 1."""

import re
from functools import cache
from typing import Any

from worker.trainer.scoring.matching import without_reasoning

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""Matches a word; in scripts without spaces between words, a character."""


def rouge_l(wanted: str, answer: str) -> float:
    """Returns ROUGE-L's F-measure: the longest common subsequence of words relative to both texts (Lin 2004).

    Words may be in any script, and are in lower case. Why not the package rouge-score: its words have only a to z, so
    an answer in Greek would score 0, and its subsequence takes a second for two texts of 1,500 words.
    """
    from rapidfuzz.distance import LCSseq

    first, second = _words(wanted), _words(answer)
    if not first or not second:
        return float(first == second)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def chrf(wanted: str, answer: str) -> float:
    """Returns chrF2: the F-score of character n-grams up to 6, with recall weighted twice (Popović 2015; sacrebleu)."""
    score: float = _scorer().sentence_score(without_reasoning(answer), [without_reasoning(wanted)]).score
    return score / 100


@cache
def _scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _words(text: str) -> list[str]:
    return _WORD.findall(without_reasoning(text).lower())
