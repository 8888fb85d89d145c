"""Rows of tokens as bytes, the form in which processes that prepare a large file pass them on, and files hold them.

Does not import torch, since those processes import this module.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tunery.failures import InvalidTrainingFile
from tunery.rows.bulk import Judged
from worker.trainer.row import Example, Row

_ID = "i"  # four bytes


@dataclass
class Block:
    """Concatenated examples, and what became of the lines that they were made from.

    `data`: each row's ids, then its labels. `lengths` and `labelled`: one for each row. `rows`: one for each example.
    `truncated`, `unlearnable`: see `data.Rows`. `fault`: that of the line at which reading ends.
    """

    data: bytearray = field(default_factory=bytearray)
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    labelled: "array[int]" = field(default_factory=lambda: array("q"))
    rows: "array[int]" = field(default_factory=lambda: array("q"))
    truncated: list[int] = field(default_factory=list)
    unlearnable: list[int] = field(default_factory=list)
    fault: InvalidTrainingFile | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(self.lengths)

    def add(self, example: Sequence[Row]) -> None:
        """Appends an example's rows."""
        for row in example:
            length = len(row.input_ids)
            # An `array` of a list takes half as long again.
            self.data += struct.pack(f"{2 * length}{_ID}", *row.input_ids, *row.labels)
            self.lengths.append(length)
            self.labelled.append(row.labelled)
        self.rows.append(len(example))

    def examples(self) -> Iterator[Example]:
        """Yields the examples, with lists of ids and labels."""
        ids, start = array(_ID, bytes(self.data)), 0
        lengths = iter(self.lengths)
        for count in self.rows:
            rows = []
            for length in islice(lengths, count):
                end = start + length
                rows.append(Row(ids[start:end].tolist(), ids[end : end + length].tolist()))
                start = end + length
            yield Example(tuple(rows))


def gather(judged: Iterable[Judged]) -> Block:
    """Collects the examples of encoded lines, up to the first fault."""
    block = Block()
    for line in judged:
        if line.encoded is None:
            block.fault = line.fault
            break
        for rows in line.encoded.examples:
            block.add([Row(row.input_ids, row.labels) for row in rows])
        if not line.encoded.examples:
            block.unlearnable.append(line.number)
        elif line.encoded.truncated:
            block.truncated.append(line.number)
    return block
