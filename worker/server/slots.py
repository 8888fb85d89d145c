"""The keys and values of a running batch, in which a row joins and leaves without moving the others."""

import math
from itertools import chain

import torch

from worker.trainer.decoding.cache import Cache

_STEP = 256
"""Positions by which slots grow."""
_WASTE = 4
"""The most memory that is held, as a multiple of what is needed: it is not copied whenever a row leaves."""

Parts = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one row, by layer: heads x positions x width."""


class Slots(Cache):
    """The cache of a running batch, whose rows fill the first `count` slots."""

    def clear(self) -> None:
        """Frees all slots."""
        super().clear()
        self.count = 0

    def size(self, count: int, longest: int) -> int:
        """Returns the bytes held after `fit` for `count` rows of at most `longest` positions."""
        return (
            self.nbytes if self._suits(count, longest) else math.prod(_extent(count, longest)) * self.bytes_a_position
        )

    def most(self, nbytes: int) -> int:
        """Returns the most positions of one row that fit into this memory."""
        return max(nbytes // self.bytes_a_position // _STEP, 1) * _STEP

    def _suits(self, count: int, longest: int) -> bool:
        """Whether the memory held is enough, and not far more than needed."""
        if not self.keys:
            return False
        slots, positions = self.keys[0].shape[0], self.keys[0].shape[2]
        is_enough = slots >= count and positions >= longest
        return is_enough and slots * positions <= _WASTE * math.prod(_extent(count, longest))

    def take(self, longest: int) -> int:
        """Takes the next slot for a row and returns it; `longest`: positions of the longest row."""
        if not self.keys:
            self.keys = [keys for keys, _ in self._empty]
            self.values = [values for _, values in self._empty]
        slot, self.count = self.count, self.count + 1
        self.fit(longest)
        return slot

    def swap(self, one: int, other: int) -> None:
        """Swaps the rows of two slots."""
        if one != other:
            for part in chain(self.keys, self.values):
                part[[one, other]] = part[[other, one]]

    def drop(self) -> None:
        """Frees the last row's slot."""
        self.count -= 1
        for part in chain(self.keys, self.values):
            part[self.count] = 0  # a masked NaN is still a NaN after the product, in the next row of this slot

    def save(self, slot: int, length: int) -> Parts:
        """Returns copies of a row's first `length` keys and values."""
        return [
            (keys[slot, :, :length].clone(), values[slot, :, :length].clone())
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def load(self, slot: int, parts: Parts, length: int) -> None:
        """Writes a row's first `length` keys and values."""
        for keys, values, (first_keys, first_values) in zip(self.keys, self.values, parts, strict=True):
            keys[slot, :, :length] = first_keys[:, :length]
            values[slot, :, :length] = first_values[:, :length]

    def fit(self, longest: int) -> None:
        """Makes room for `count` rows of at most `longest` positions, and frees memory far beyond that."""
        if not self._suits(self.count, longest):
            self.version += 1
            many, wide = _extent(self.count, longest)
            for parts in (self.keys, self.values):
                for layer, part in enumerate(parts):  # layer by layer, so that only one layer is held twice
                    parts[layer] = _resized(part, many, wide)

    def reach(self, longest: int) -> int:
        """Returns the positions that a pass over rows of at most `longest` reads if it is recorded: few numbers."""
        return int(min(self.keys[0].shape[2], -(-longest // _STEP) * _STEP))


def _extent(count: int, length: int) -> tuple[int, int]:
    """Returns the slots and positions allocated for `count` rows of at most `length`."""
    return 1 << (count - 1).bit_length(), -(-length // _STEP) * _STEP


def _resized(part: torch.Tensor, slots: int, positions: int) -> torch.Tensor:
    # Zeros: what no row has written is masked, and a masked NaN would still be a NaN after the product.
    made = part.new_zeros(slots, part.shape[1], positions, part.shape[3])
    slots, positions = min(slots, part.shape[0]), min(positions, part.shape[2])
    made[:slots, :, :positions] = part[:slots, :, :positions]
    return made
