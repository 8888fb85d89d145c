"""Finds rows that ask the general benchmark's questions, which would inflate a scorecard's general ability."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunery.datasets.report import texts
from tunery.datasets.report.case import Case, Finding

_LEAST = 4
"""Minimum words of a question to be found between other sentences: `Hello` begins many conversations."""
_JOINED = re.compile(r"[\s,'\u2019-]*")
"""What stands between two words of one sentence."""
_CHOICE = re.compile(r"\s*[(\[]?[a-e1-5][).:\]]")
"""What stands before a choice: `A)`."""
_ACTION = "Drop the row: with it, the scorecard overestimates general ability."

_Words = tuple[str, ...]


def read(folder: Path) -> frozenset[str]:
    """Returns the words of the benchmark's questions, from the JSON Lines files of `folder`."""
    files = (path.read_text(encoding="utf-8").split("\n") for path in sorted(folder.glob("*.jsonl")))
    return frozenset(texts.words(_question(json.loads(line))) for lines in files for line in lines if line)


def _question(item: dict[str, Any]) -> str:
    if "question" in item:
        return str(item["question"])
    return "\n".join(str(message["content"]) for message in item["messages"] if message["role"] == "user")


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose question equals one of the benchmark's, ignoring case and punctuation, or has it between other
    sentences, such as an instruction and choices."""
    beginnings = _beginnings(case.benchmark)
    for row in case.answered if case.benchmark else ():
        if texts.words(row.question) in case.benchmark or _holds_one(row.question, beginnings):
            yield Finding(
                "benchmark_overlap", [row.line], 1.0, "Asks the same as an item of the general benchmark.", _ACTION
            )


def _beginnings(questions: Iterable[str]) -> dict[_Words, list[_Words]]:
    """Returns the questions by their first words."""
    found: dict[_Words, list[_Words]] = {}
    for words in (tuple(question.split()) for question in questions):
        if len(words) >= _LEAST:
            found.setdefault(words[:_LEAST], []).append(words)
    return found


def _holds_one(text: str, beginnings: Mapping[_Words, list[_Words]]) -> bool:
    words = texts.words(text).split()
    hits = [
        (at, at + len(asked))
        for at, first in enumerate(zip(*(words[at:] for at in range(_LEAST)), strict=False))
        for asked in beginnings.get(first, ())
        if tuple(words[at : at + len(asked)]) == asked
    ]
    return bool(hits) and _any_apart(text.casefold(), hits)


def _any_apart(text: str, hits: Iterable[tuple[int, int]]) -> bool:
    """Whether the words from the one to the other place of any hit are whole sentences of the text."""
    places = [(0, 0), *(match.span() for match in texts.WORD.finditer(text)), (len(text), len(text))]
    gaps = [text[end:begin] for (_, end), (begin, _) in itertools.pairwise(places)]
    breaks = ["\n" in gap or not _JOINED.fullmatch(gap) for gap in gaps]
    breaks[0] = breaks[-1] = True
    return any(breaks[begin] and (breaks[end] or _CHOICE.match(text, places[end][1])) for begin, end in hits)
