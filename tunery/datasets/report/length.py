"""Finds rows that are longer than the token limit."""

import re
from collections.abc import Iterator
from pathlib import Path

from tunery.datasets.report.case import Case, Counter, Finding
from tunery.rows.template_files import load_tokenizer

_PIECE = re.compile(r"\w{1,6}|[^\w\s]")
_AROUND = 4
"""Approximate tokens that a chat template writes around a message."""
_ACTION = "Shorten the row, or raise the token limit: the excess is cut off, and the answer comes last."


def tokenizer(folder: Path) -> Counter:
    """Returns a token counter of the base in `folder`. Raises CannotRender if it has no tokenizer.json."""
    loaded = load_tokenizer(folder / "tokenizer.json" if folder.is_dir() else folder)
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)


def estimate(text: str) -> int:
    """Returns the approximate tokens of a text: words in pieces of six letters, and punctuation."""
    return len(_PIECE.findall(text))


def find(case: Case) -> Iterator[Finding]:
    """Finds rows with more tokens than `max_tokens`."""
    count = case.count or estimate
    about = "" if case.count else "about "
    for row in case.rows:
        # No token is shorter than a byte.
        size = sum(len(turn.text) * 4 + _AROUND for turn in row.turns)
        if size <= case.max_tokens:
            continue
        tokens = sum(count(turn.text) + _AROUND for turn in row.turns)
        if tokens > case.max_tokens:
            why = f"Has {about}{tokens:,} tokens, but only {case.max_tokens:,} are trained."
            yield Finding("too_long", [row.line], 1 - case.max_tokens / tokens, why, _ACTION)
