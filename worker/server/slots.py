"""The keys and values of a running batch, with a slot for each row.

A row begins at the first position of its slot, whatever the others' lengths: it joins and leaves without moving them,
and positions after its last token are masked. transformers' own caches hold rows of equal length.
"""

import math
from itertools import chain
from typing import Any

import torch

_STEP = 256
"""Positions by which slots grow."""
_WASTE = 4
"""The most memory that is held, as a multiple of what is needed: it is not copied whenever a row leaves."""

Parts = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one row, by layer: heads x positions x width."""


class Slots:
    """The cache of keys and values that transformers' attention layers use.

    `keys[layer]` and `values[layer]` are slots x heads x positions x width. Rows fill the first `count` slots.
    """

    def __init__(self, model: Any) -> None:
        """Reads the shapes of a model's keys and values from a pass over one token."""
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            layers = model(input_ids=token, use_cache=True).past_key_values.layers
        self._empty = [(layer.keys[:0, :, :0].clone(), layer.values[:0, :, :0].clone()) for layer in layers]
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        self.bytes_a_position: int = sum(part[0, :, 0].nbytes for part in parts)
        """Bytes of one position of one slot, in all layers."""
        self._device: torch.device = model.device
        self.version = 0
        """Changes whenever keys and values move."""
        self.clear()

    def clear(self) -> None:
        """Frees all slots."""
        self.version += 1
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.count = 0
        self._length = 0
        self._rows: slice | torch.Tensor = slice(0, 0)
        self._places = self._positions = torch.empty(0, 0, dtype=torch.long)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(part.nbytes for part in chain(self.keys, self.values))

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
        if not self.count:
            self.clear()
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

    def place(self, rows: list[int], positions: list[list[int]]) -> torch.Tensor:
        """Prepares a pass in which the row in slot rows[i] reads tokens at positions[i]; returns the positions."""
        self._length = max(map(max, positions)) + 1
        places = torch.tensor(rows, device=self._device)
        # A slice if possible: an index copies.
        self._rows = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else places
        self._places = places[:, None]
        self._positions = torch.tensor(positions, device=self._device)
        return self._positions

    def reach(self, longest: int) -> int:
        """Returns the positions that a pass over rows of at most `longest` reads if it is recorded: few numbers."""
        return int(min(self.keys[0].shape[2], -(-longest // _STEP) * _STEP))

    def place_all(self, positions: torch.Tensor, reach: int) -> None:
        """Prepares a pass in which each of the first rows reads a token at its position [rows, 1] on the device, and
        the first `reach` positions.
        """
        count = positions.shape[0]
        self._length, self._rows = reach, slice(0, count)
        self._places = torch.arange(count, device=self._device)[:, None]
        self._positions = positions

    def visible(self, window: int | None) -> torch.Tensor:
        """Returns the mask of positions that each token of the pass sees, its own included: rows x 1 x tokens x
        positions.
        """
        positions = torch.arange(self._length, device=self._device)
        seen = positions <= self._positions[..., None]
        if window is not None:
            seen &= positions > self._positions[..., None] - window
        return seen[:, None]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Stores a layer's keys and values of the pass; returns all of its rows'. The signature is transformers'."""
        self.keys[layer][self._places, :, self._positions] = keys.transpose(1, 2)
        self.values[layer][self._places, :, self._positions] = values.transpose(1, 2)
        return self.keys[layer][self._rows, :, : self._length], self.values[layer][self._rows, :, : self._length]

    def get_seq_length(self, *_: Any) -> int:
        return self._length


def _extent(count: int, length: int) -> tuple[int, int]:
    """Returns the slots and positions allocated for `count` rows of at most `length`."""
    return 1 << (count - 1).bit_length(), -(-length // _STEP) * _STEP


def _resized(part: torch.Tensor, slots: int, positions: int) -> torch.Tensor:
    # Zeros: what no row has written is masked, and a masked NaN would still be a NaN after the product.
    made = part.new_zeros(slots, part.shape[1], positions, part.shape[3])
    slots, positions = min(slots, part.shape[0]), min(positions, part.shape[2])
    made[:slots, :, :positions] = part[:slots, :, :positions]
    return made
