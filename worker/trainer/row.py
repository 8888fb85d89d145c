"""A row of tokens, and an example: the rows that are drawn together."""

from collections.abc import Iterable
from dataclasses import dataclass

from tunery.rows.template import IGNORED


@dataclass(frozen=True)
class Row:
    """A row of tokens: their ids, and for each the label to learn, or -100."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labelled(self) -> int:
        """The number of trained tokens. The first token cannot be predicted, as nothing comes before it."""
        learned = len(self.labels) - self.labels.count(IGNORED)
        return learned - (self.labels[:1] not in ([], [IGNORED]))


@dataclass(frozen=True)
class Example:
    """Rows that a method learns together, in its order. They are drawn together and share a micro-batch.

    `reference`: each row's log-probability (the sum over its labelled tokens, in nats) by the initial model; empty
    until it is measured, and if the method does not need it.
    """

    rows: tuple[Row, ...]
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def labelled(self) -> int:
        return sum(row.labelled for row in self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows, and the length of the longest."""
        return len(self.rows), max(map(len, self.rows))


def singles(rows: Iterable[Row]) -> list[Example]:
    """Returns one example for each row."""
    return [Example((row,)) for row in rows]
