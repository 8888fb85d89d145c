"""The project's texts contain no addresses of registries, no paths of one machine, and no refused words."""

import re
from pathlib import Path

# Written in pieces, as this file would otherwise be found itself.
REGISTRIES = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".org",
    "deb.debian" + ".org",
    "download.pytorch" + ".org",
)
REFUSED = re.compile(r"\b(deeds?|wish(es)?|told|mend|anew|whoever|for ever|strangers?)\b", re.IGNORECASE)
"""Metaphors and old words, for which the field has a term of its own."""
TRANSLATED = re.compile(
    r"\b(by heart|all the same|at the least|belongs? into|without a word|go(es)? on (from|with)|for good|nats a token)"
    r"\b",
    re.IGNORECASE,
)
"""Phrases that read as translated: say memorise, anyway, at least, suit, silently, continue, permanently, per token."""
TEXTS = (".py", ".md", ".jinja", ".patch", ".svg", ".toml", ".yml", ".sh")
"""The kinds of file that the project writes itself; rows of data sets are their authors' text."""
STATES_THEM = ("CHANGELOG.md", "changelog.d/", "tests/house/")
"""Files that may contain the words: the history of names, and the tests that list them."""
STORED = re.compile(r"\b(CheckConstraint|Column|mapped_column)\(")
"""Matches lines that define a column, which keeps its first name."""
PLACES = re.compile(r"(?<![\w.-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me)/\w")


def _sayings(texts: dict[Path, str], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number} {line.strip()}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_registry_is_named(texts: dict[Path, str]) -> None:
    """A closed network has its own mirror, which is set once in pip's configuration."""
    assert _sayings(texts, re.compile("|".join(map(re.escape, REGISTRIES)))) == []


def test_no_path_of_one_machine_is_named(texts: dict[Path, str]) -> None:
    assert _sayings(texts, PLACES) == []


def test_none_of_the_refused_words_is_used(texts: dict[Path, str], root: Path) -> None:
    held = {path: text for path, text in texts.items() if not str(path.relative_to(root)).startswith(STATES_THEM)}
    assert [line for line in _sayings(held, REFUSED) if not STORED.search(line)] == []


def test_none_of_the_translated_phrases_is_used(texts: dict[Path, str], root: Path) -> None:
    own = {path: text for path, text in texts.items() if path.suffix in TEXTS}
    held = {path: text for path, text in own.items() if not str(path.relative_to(root)).startswith(STATES_THEM)}
    assert _sayings(held, TRANSLATED) == []
