"""Identifies the language of texts, and finds rows in another language than nearly all others."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from tunery.datasets.report.case import Case, Finding
from tunery.datasets.report.rows import Row
from tunery.rows.words import pattern

PARTS = ("question", "answer")
_FRACTION = 0.9
_LEAST = 20
"""Minimum texts for meaningful shares."""
_LETTERS = 15
"""Minimum letters of a text: a name or a label may be in any language."""
_READ = 300
"""Characters of a text that are read; more do not improve the result."""
_SURE = 0.75
_UNLIKE = 0.05
"""Maximum probability of the usual language for a finding of another one."""
SAMPLED = 4000
"""Rows whose language is identified, of more than these at random."""
_SUSPECTS = 2000
"""Rows besides them that are identified since they have few of the usual language's words."""
_WORDS, _FAMILIAR = 300, 0.15
_NO_LANGUAGE = "zxx"
_LETTER, _WORD = re.compile(r"[^\W\d_]"), re.compile(pattern(r"[^\W\d_]"))
_ACTION = "Correct the language, or give rows of another language a file of their own."


@cache
def _identifier() -> Any:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=65536)
def identify(text: str) -> tuple[tuple[str, float], ...]:
    """Returns a text's two likeliest languages (ISO 639) with probabilities; none for a text that is too short."""
    text = text[:_READ]
    if len(_LETTER.findall(text)) < _LETTERS:
        return ()
    return tuple(_identifier().rank(text)[:2])


def language_of(text: str) -> str | None:
    """Returns a text's language if it is certain, else None."""
    found = identify(text)
    return found[0][0] if found and found[0][1] >= _SURE and found[0][0] != _NO_LANGUAGE else None


def figures(case: Case) -> dict[str, Any]:
    """How many questions and answers are in each language, of those that were identified (`sampled` rows). Texts that
    are too short, or surely in none, are counted as `unknown`."""
    rows = _sample(case.answered)
    if not rows:
        return {}
    counts = {part: Counter(language_of(getattr(row, part)) or "unknown" for row in rows) for part in PARTS}
    return {"sampled": len(rows)} | {part: dict(found.most_common()) for part, found in counts.items()}


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose question or answer is in another language than at least nine in ten."""
    named = case.lines_found("other_script")
    for part in PARTS:
        sampled = _sample(case.answered)
        counts = Counter(language for row in sampled if (language := language_of(getattr(row, part))))
        usual, count = next(iter(counts.most_common(1)), ("", 0))
        if counts.total() < _LEAST or count < _FRACTION * counts.total():
            continue
        for row in [*sampled, *_suspects(case.answered, sampled, part)]:
            language = language_of(getattr(row, part))
            if language not in (None, usual) and row.line not in named and _is_unlike(getattr(row, part), usual):
                fraction = count / counts.total()
                why = f"The {part} is in the language '{language}', but {fraction:.1%} of the others are in '{usual}'."
                yield Finding("other_language", [row.line], identify(getattr(row, part))[0][1], why, _ACTION)


def _is_unlike(text: str, usual: str) -> bool:
    return all(language != usual or likely <= _UNLIKE for language, likely in identify(text))


def _sample(rows: Sequence[Row]) -> Sequence[Row]:
    if len(rows) <= SAMPLED:
        return rows
    return random.Random(0).sample(rows, SAMPLED)  # noqa: S311 (draws rows to read)


def _suspects(rows: Sequence[Row], sampled: Sequence[Row], part: str) -> Iterator[Row]:
    """Yields rows outside the sample with few of its most common words, as identifying all rows would take minutes."""
    if len(rows) == len(sampled):
        return
    counts = Counter(word for row in sampled for word in _WORD.findall(getattr(row, part)[:_READ].casefold()))
    usual = {word for word, _ in counts.most_common(_WORDS)}
    known, found = {row.line for row in sampled}, 0
    for row in rows:
        words = _WORD.findall(getattr(row, part)[:_READ].casefold())
        if row.line not in known and sum(word in usual for word in words) < _FAMILIAR * len(words):
            yield row
            found += 1
            if found == _SUSPECTS:
                return
