"""A row of tokens, and what is drawn as one."""

from collections.abc import Iterable
from dataclasses import dataclass

from tunery.rows.template import IGNORED


@dataclass(frozen=True)
class Row:
    """One row of tokens: their ids, and for each the id to learn or -100."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labelled(self) -> int:
        """Tokens that are predicted and learnt. The first one has nothing before it to be predicted from."""
        learned = len(self.labels) - self.labels.count(IGNORED)
        return learned - (self.labels[:1] not in ([], [IGNORED]))


@dataclass(frozen=True)
class Example:
    """What is drawn as one: the rows that a method learns together, in its order. They share a micro-batch.

    `reference`: each row's log-probability (of its labelled tokens, summed, in nats) by the model that the run starts
    from; empty until it is measured, and where the method does not ask for it.
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
        """How many rows it has, and the length of the longest."""
        return len(self.rows), max(map(len, self.rows))


def singles(rows: Iterable[Row]) -> list[Example]:
    """Returns an example of each row."""
    return [Example((row,)) for row in rows]
