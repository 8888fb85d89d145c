"""The keys and values of a running batch, a slot for each row.

A row begins at the first position of its slot, whatever the others' lengths: it joins and leaves without moving them,
and what lies behind its last token is masked. transformers' own caches hold rows of one length.
"""

from itertools import chain
from typing import Any

import torch

_STEP = 256
"""Positions by which slots become longer."""


class Slots:
    """What transformers' attention layers take for a cache, for steps of one token a row.

    `keys[layer]` and `values[layer]` are slots x heads x positions x width. Rows fill the first `count` slots.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.count = 0
        self._rows = self._positions = torch.empty(0, dtype=torch.long)
        self._length = 0

    @property
    def bytes_a_position(self) -> int:
        """Memory of one position of one slot, in all layers. 0 before the first row."""
        return sum(part[0, :, 0].nbytes for part in chain(self.keys, self.values))

    def adopt(self, cache: Any) -> int:
        """Takes over a row's own cache, of a batch of one; returns its slot."""
        parts = [(layer.keys, layer.values) for layer in cache.layers]
        length: int = cache.get_seq_length()
        if not self.keys:
            self.keys = [key[:0, :, :0] for key, _ in parts]
            self.values = [value[:0, :, :0] for _, value in parts]
        slot, self.count = self.count, self.count + 1
        self.fit(length)
        for layer, (key, value) in enumerate(parts):
            kept = key.shape[2]  # layers with a sliding window forget what lies before it
            self.keys[layer][slot, :, length - kept : length] = key[0]
            self.values[layer][slot, :, length - kept : length] = value[0]
        return slot

    def drop(self, slot: int) -> None:
        """Frees a slot: the last one's row moves into it."""
        self.count -= 1
        if not self.count:
            self.keys, self.values = [], []
        for part in chain(self.keys, self.values):
            if slot < self.count:
                part[slot] = part[self.count]
            part[self.count] = 0  # a NaN that is masked is still one after the product, in the next row of this slot

    def fit(self, length: int) -> None:
        """Makes room for `count` rows of at most `length` positions, and gives back what is far more than that."""
        slots, positions = self.keys[0].shape[0], self.keys[0].shape[2]
        wide = -(-length // _STEP) * _STEP
        many = 1 << (self.count - 1).bit_length()
        if slots < self.count or positions < length or slots * positions > 4 * many * wide:
            self.keys = [_resized(part, many, wide) for part in self.keys]
            self.values = [_resized(part, many, wide) for part in self.values]

    def place(self, lengths: list[int]) -> torch.Tensor:
        """Prepares a step in which the row of slot i, of lengths[i] tokens, gets one more; returns the positions."""
        device = self.keys[0].device
        self._length = max(lengths) + 1
        self.fit(self._length)
        self._rows = torch.arange(len(lengths), device=device)
        self._positions = torch.tensor(lengths, device=device)
        return self._positions

    def visible(self, window: int | None) -> torch.Tensor:
        """Which positions each row of the step sees, itself included: rows x 1 x 1 x positions."""
        positions = torch.arange(self._length, device=self._positions.device)
        seen = positions <= self._positions[:, None]
        if window is not None:
            seen &= positions > self._positions[:, None] - window
        return seen[:, None, None]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """A layer's keys and values of all rows, the step's among them. The name and form are those of transformers."""
        self.keys[layer][self._rows, :, self._positions] = keys[:, :, 0]
        self.values[layer][self._rows, :, self._positions] = values[:, :, 0]
        rows = len(self._rows)
        return self.keys[layer][:rows, :, : self._length], self.values[layer][:rows, :, : self._length]

    def get_seq_length(self, *_: Any) -> int:
        return self._length


def _resized(part: torch.Tensor, slots: int, positions: int) -> torch.Tensor:
    # Zeros: what no row has written is masked, and a masked NaN would still be one after the product.
    made = part.new_zeros(slots, part.shape[1], positions, part.shape[3])
    slots, positions = min(slots, part.shape[0]), min(positions, part.shape[2])
    made[:slots, :, :positions] = part[:slots, :, :positions]
    return made
