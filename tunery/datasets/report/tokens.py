"""Measures rows by a base's tokenizer and chat template: their lengths, and what a token limit cuts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunery.datasets.report.case import Finding, invalid_row
from tunery.datasets.report.rows import Row, of_example
from tunery.datasets.report.verdict import ANY_METHOD
from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.encoding import Encoded
from tunery.rows.shapes import FileShape
from tunery.rows.template import IGNORED, ChatTemplate

_UNCUT = 2**24
_SHORTEST = 256
_TURNS = 8
"""Turns whose lengths are listed one by one; later turns are counted only by role."""


class Lengths:
    """Measures rows one by one. Lengths are tokens as in training, including those of the chat template."""

    def __init__(self, base: Path, max_tokens: int) -> None:
        self.template = ChatTemplate.load(base)
        self.max_tokens = max_tokens
        self.findings: list[Finding] = []
        self._rows: list[int] = []
        self._needed: list[int] = []
        self._first: list[int] = []
        self._parts: dict[str, list[int]] = {}

    def measure(self, chunks: Iterable[bytes], most: int, columns: Mapping[str, str] | None = None) -> None:
        """Reads a file's first rows, as many as have `most` characters together. `columns`: see `FileShape`."""
        shape = FileShape(columns)
        for source in readers.read(chunks):
            try:
                example = ANY_METHOD.parse(source._replace(shape=shape), "training")
            except InvalidTrainingFile:  # the report has such rows already
                continue
            row = of_example(source.number, example)
            most -= row.size
            if most < 0:
                return
            try:
                encoded = ANY_METHOD.encode(self.template, example, source.name, max_length=_UNCUT, role="training")
            except InvalidTrainingFile as error:
                self.findings.append(invalid_row(source.number, str(error.fields["reason"])))
                continue
            self._add(row, encoded)

    def _add(self, row: Row, encoded: Encoded) -> None:
        if not encoded.sequences:
            why = "No token of the row is trained: no assistant message has text to learn."
            self.findings.append(Finding("untrained", [row.line], 1.0, why, "Give it an answer, or drop the row."))
            return
        trained = [_trained(sequence.labels) for sequence in encoded.sequences]
        needed = max(last for _, last in trained)
        self._rows.append(encoded.longest)
        self._needed.append(needed)
        self._first.append(min(first for first, _ in trained))
        for name, text in _parts(row):
            ids = self.template.tokenizer.encode(text, add_special_tokens=False).ids
            self._parts.setdefault(name, []).append(len(ids))
        if needed > self.max_tokens:
            why = f"The answer ends at token {needed:,}, but only {self.max_tokens:,} are trained."
            action = "Shorten the row, or raise the token limit."
            self.findings.append(Finding("answer_cut", [row.line], 1 - self.max_tokens / needed, why, action))

    def figures(self, base: str) -> dict[str, Any]:
        """Returns the distributions, and what each candidate length would cut."""
        if not self._rows:
            return {"base": base, "max_tokens": self.max_tokens, "total": 0, "spreads": {}, "lengths": []}
        spreads = {"row": _spread(self._rows)} | {name: _spread(found) for name, found in self._parts.items()}
        return {
            "base": base,
            "max_tokens": self.max_tokens,
            "total": sum(self._rows),
            "spreads": spreads,
            "lengths": [self._cut(length) for length in _candidates(max(self._rows))],
        }

    def _cut(self, length: int) -> dict[str, Any]:
        truncated = sum(size > length for size in self._rows)
        return {
            "length": length,
            "truncated": truncated,
            "share": round(truncated / len(self._rows), 4),
            "answer_cut": sum(needed > length for needed in self._needed),
            "answer_lost": sum(first > length for first in self._first),
        }


def _trained(labels: Sequence[int]) -> tuple[int, int]:
    """Returns how many tokens a length must keep for the first trained one, and for all of them."""
    at = [place for place, label in enumerate(labels, 1) if label != IGNORED and place > 1]
    return at[0], at[-1]


def _parts(row: Row) -> Iterator[tuple[str, str]]:
    """The texts that are measured: each message by its role, the first ones also by their turn."""
    turn = 0
    for message in row.turns:
        yield message.role, message.text
        turn += message.role == "user"
        if 0 < turn <= _TURNS and message.role in ("user", "assistant"):
            yield f"turn {turn} {message.role}", message.text


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    found = np.percentile(lengths, (50, 90, 99), method="higher").astype(int).tolist()
    return {"count": len(lengths), "p50": found[0], "p90": found[1], "p99": found[2], "max": max(lengths)}


def _candidates(longest: int) -> Iterator[int]:
    """Yields powers of two, up to the first that cuts nothing."""
    length = _SHORTEST
    yield length
    while length < longest:
        length *= 2
        yield length
