"""Finds labels in a spelling that hardly any row has: another case, a typing error, an invisible character."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tunery.datasets.report import sameness
from tunery.datasets.report.labels import Task

_RARE, _LEAST = 0.05, 4
"""The share of a label's rows up to which another spelling of it is an error, and rows from which on a single one is:
a file may write a label in two ways."""
_KNOWN = 0.95
"""The share of the rows with recurring labels from which on a value that a single row has is worth a look."""
_TYPO, _SINGLE = 0.75, 0.3
"""The scores of those: a single value may be a rare class."""
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
_AROUND = " \t\r\n\"'`.,;:!?\u00ab\u00bb\u2018\u2019\u201c\u201d\u201e"
_SEPARATORS = re.compile(r"(?<=\w)(?:[\W_](?<![+#]))+(?=\w)")


class Odd(NamedTuple):
    """A label that is probably spelled wrong: its row, the confidence from 0 to 1, why, and what to do."""

    line: int
    score: float
    why: str
    action: str


def find(task: Task) -> Iterator[Odd]:
    """Yields the rows of a task whose label is a rare spelling of another one, or that are the only ones to have it."""
    counts = Counter(task.written.values())
    usual = _usual(task, counts)
    most_recur = len(task.labels) >= _KNOWN * len(task.written)
    judged = {value: _judge(value, task.name, counts, usual, most_recur) for value in counts}  # many rows have one
    for line, value in task.written.items():
        if (found := judged[value]) is not None:
            yield Odd(line, *found)


def _judge(
    value: str, name: str, counts: Mapping[str, int], usual: Mapping[str, str], most_recur: bool
) -> tuple[float, str, str] | None:
    """Returns an odd label's score, why it is odd, and what to do; None of one that is not."""
    key, many = _key(value), counts[value]
    label = usual.get(key) or next((one for other, one in usual.items() if sameness.is_misspelt(key, other)), None)
    if label is None:
        why = f"Is the only row with {name} {_shown(value)}."
        is_single = most_recur and many == 1
        return (_SINGLE, why, "Correct the label if it is wrong, or add rows that have it.") if is_single else None
    rare = max(_RARE * counts[label], 1 if counts[label] >= _LEAST else 0)
    if label == value or many > rare:
        return None
    score = 1 - many / counts[label] if key in usual else _TYPO
    why = f"Has {name} {_shown(value)}, which {counts[label]:,} rows write {_shown(label)}."
    return score, why + _named(value, label), f"Write {_shown(label)}, unless another label is meant."


def _usual(task: Task, counts: Mapping[str, int]) -> dict[str, str]:
    """Returns the most frequent spelling of each label, by its letters."""
    usual: dict[str, str] = {}
    for value in sorted({task.written[line] for line in task.labels}, key=lambda one: -counts[one]):
        usual.setdefault(_key(value), value)
    return usual


def _key(value: str) -> str:
    """Returns a label without what two spellings of it may differ in: case, separators of words, quotes around it."""
    folded = unicodedata.normalize("NFKC", value.casefold())
    visible = "".join(one for one in folded if unicodedata.category(one) != "Cf").strip(_AROUND)
    return _SEPARATORS.sub(lambda found: found[0] if _is_between_digits(found) else "", visible)


def _is_between_digits(found: re.Match[str]) -> bool:
    return found.string[found.start() - 1].isdigit() and found.string[found.end()].isdigit()


def _shown(value: str) -> str:
    """Returns the label in quotes, with the codes of what cannot be seen."""
    signs = (f"\\u{ord(one):04x}" if _is_hidden(one) else one for one in value)
    return f"'{''.join(signs)}'"


def _is_hidden(character: str) -> bool:
    return character != " " and unicodedata.category(character) in _INVISIBLE


def _named(value: str, label: str) -> str:
    """Returns a sentence with the name of a letter that may look like the label's, else nothing."""
    strange = [one for one in value if one not in label and not one.isascii() and one.isalpha()]
    return f" It has {unicodedata.name(strange[0], 'another letter')}." if strange and label.isascii() else ""
