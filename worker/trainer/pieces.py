"""A rank's piece of a weight that is sharded over the ranks: some of its rows, and their optimizer state.

Pieces follow each other in the order of the ranks, as in torch's `fully_shard`: the first ranks have more rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

BLOCK = 256
"""Elements whose 8-bit moments share a scale: the block size of bitsandbytes' kernels."""
_WHOLE_STATE = ("step", "qmap1", "qmap2")
"""Entries of a weight's optimizer state that are the same on every rank."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `end` of a weight of this shape, of which each of the first ranks has `each`."""

    shape: tuple[int, ...]
    start: int
    end: int
    each: int

    @property
    def row(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def whole(self) -> int:
        """Elements of the whole weight."""
        return math.prod(self.shape)

    @property
    def offset(self) -> int:
        """Elements of the whole weight before this piece."""
        return self.start * self.row

    @property
    def at_blocks(self) -> bool:
        """Whether the piece begins and ends at the whole weight's blocks of moments."""
        ends = self.end * self.row
        return self.offset % BLOCK == 0 and (ends % BLOCK == 0 or ends == self.whole)

    def part_of(self, length: int) -> slice:
        """Returns this piece's part of all pieces' rows, elements, or blocks of elements, whichever `length` counts."""
        if length == self.shape[0]:
            return slice(self.start, self.end)
        if length == self.whole:
            return slice(self.offset, self.end * self.row)
        first = self.start // max(1, self.each) * -(-self.each * self.row // BLOCK)
        return slice(first, first + -(-(self.end - self.start) * self.row // BLOCK))


def cut(shape: Sequence[int], rank: int, ranks: int) -> Piece:
    """Returns a rank's piece."""
    rows = -(-shape[0] // ranks)
    return Piece(tuple(shape), min(shape[0], rank * rows), min(shape[0], (rank + 1) * rows), rows)


def mark(parameter: nn.Parameter, piece: Piece) -> nn.Parameter:
    """Marks a parameter as this piece."""
    parameter.piece = piece  # type: ignore[attr-defined]  # optimizers get only parameters
    return parameter


def of(parameter: Tensor) -> Piece | None:
    """Returns the piece that a parameter is; None for a whole weight."""
    found: Piece | None = getattr(parameter, "piece", None)
    return found


def whole_size(parameter: Tensor) -> int:
    """Returns the number of elements of the whole weight of which a parameter may be a piece."""
    piece = of(parameter)
    return parameter.numel() if piece is None else piece.whole


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole weight of which a parameter may be a piece."""
    piece = of(parameter)
    return tuple(parameter.shape) if piece is None else piece.shape


def is_cut(key: str, shape: Sequence[int]) -> bool:
    """Whether a piece's optimizer entry `PARAMETER:KEY` covers that piece only."""
    return len(shape) > 0 and key.rpartition(":")[2] not in _WHOLE_STATE
