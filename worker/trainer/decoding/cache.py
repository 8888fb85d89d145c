"""Keys and values of a batch, with a slot for each row.

A row begins at the first position of its slot, whatever the others' lengths, and positions after its last token are
masked. transformers' own caches hold rows of equal length.
"""

import itertools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from worker.trainer import dtypes
from worker.trainer.kernels.attention import Borders


class Cache:
    """The cache of keys and values that transformers' attention layers use.

    `keys[layer]` and `values[layer]` are slots x heads x positions x width.
    """

    def __init__(self, model: Any) -> None:
        """Reads the shapes of a model's keys and values from a pass over one token."""
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            layers = model(input_ids=token, use_cache=True).past_key_values.layers
        self._empty = [(_stored(layer.keys), _stored(layer.values)) for layer in layers]
        parts = list(chain.from_iterable(self._empty))
        self.bytes_a_position: int = sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)
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
        self._length = 0
        self._rows: slice | torch.Tensor = slice(0, 0)
        self._places = self._positions = torch.empty(0, 0, dtype=torch.long)
        self._packed: torch.Tensor | None = None
        self._joined: torch.Tensor | None = None
        self._prefix = 0

    @property
    def kinds(self) -> list[torch.Tensor]:
        """Tensors like the keys of each layer, without any."""
        return [keys for keys, _ in self._empty]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(part.nbytes for part in chain(self.keys, self.values))

    def allocate(self, slots: int, positions: int) -> None:
        """Replaces all slots by empty ones, in the same memory if they have the same shape."""
        if self.keys and self.keys[0].shape[::2] == (slots, positions):
            for part in chain(self.keys, self.values):
                part.zero_()
            return
        self.clear()
        # Zeros: what no row has written is masked, and a masked NaN would still be a NaN after the product.
        self.keys = [_zeros(keys, slots, positions) for keys, _ in self._empty]
        self.values = [_zeros(values, slots, positions) for _, values in self._empty]

    def keep(self, slots: torch.Tensor) -> None:
        """Keeps some slots, in this order."""
        self.version += 1
        for parts in (self.keys, self.values):
            for layer, part in enumerate(parts):  # layer by layer, so that only one layer is held twice
                parts[layer] = part[slots]

    def copy_first(self, length: int) -> None:
        """Copies the first `length` positions of the first slot to all others."""
        for part in chain(self.keys, self.values):
            part[1:, :, :length] = part[:1, :, :length]

    def place(self, rows: list[int], positions: list[list[int]]) -> torch.Tensor:
        """Prepares a pass in which the row in slot rows[i] reads tokens at positions[i]; returns the positions."""
        self._packed, self._length = None, max(map(max, positions)) + 1
        places = torch.tensor(rows, device=self._device)
        # A slice if possible: an index copies.
        self._rows = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else places
        self._places = places[:, None]
        self._positions = torch.tensor(positions, device=self._device)
        return self._positions

    def place_all(self, positions: torch.Tensor, reach: int) -> None:
        """Prepares a pass in which each of the first rows reads a token at its position [rows, 1] on the device, and
        the first `reach` positions.
        """
        count = positions.shape[0]
        self._packed, self._length, self._rows = None, reach, slice(0, count)
        self._places = torch.arange(count, device=self._device)[:, None]
        self._positions = positions

    def place_packed(self, first: int, lengths: Sequence[int], prefix: int) -> tuple[torch.Tensor, Borders]:
        """Prepares a pass over the tokens of rows behind each other, those of slots `first`, `first` + 1, ...

        Row i reads lengths[i] tokens after the first `prefix` positions, which are those of the first slot. Returns the
        positions [1, tokens] and the rows' borders.
        """
        counts = torch.tensor(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        places = torch.arange(len(lengths)).repeat_interleave(counts)
        offsets = torch.arange(int(ends[-1])) - ends[places]
        self._packed, self._positions = (part.to(self._device) for part in (places + first, offsets + prefix))
        self._length, self._prefix = prefix + max(lengths), prefix
        self._joined = _joined(ends.tolist(), prefix).to(self._device) if prefix else None
        key_ends = (ends + prefix * torch.arange(len(ends))).to(self._device, torch.int32)
        borders = Borders(ends.to(self._device, torch.int32), max(lengths), key_ends, self._length)
        return self._positions[None], borders

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
        return self._store(self.keys[layer], keys), self._store(self.values[layer], values)

    def _store(self, part: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Writes `new` [rows, heads, tokens, width] to a layer's slots; returns what the pass attends to."""
        new = new.to(part.dtype)
        if self._packed is None:
            part[self._places, :, self._positions] = new.transpose(1, 2)
            return part[self._rows, :, : self._length]
        part[self._packed, :, self._positions] = new[0].transpose(0, 1)
        if self._joined is None:
            return new
        return torch.cat((part[:1, :, : self._prefix], new), dim=2)[:, :, self._joined]

    def get_seq_length(self, *_: Any) -> int:
        return self._length


def _stored(part: torch.Tensor) -> torch.Tensor:
    """Returns an empty tensor of a layer's shape, in the type in which attention multiplies."""
    return part[:0, :, :0].to(dtypes.multiplied_in(part.dtype, part.device.type), copy=True)


def _zeros(part: torch.Tensor, slots: int, positions: int) -> torch.Tensor:
    return part.new_zeros(slots, part.shape[1], positions, part.shape[3])


def _joined(ends: list[int], prefix: int) -> torch.Tensor:
    """Returns the places of each row's keys in those of the prefix followed by those of all rows."""
    first = torch.arange(prefix)
    rows = (torch.arange(prefix + start, prefix + end) for start, end in itertools.pairwise(ends))
    return torch.cat([part for row in rows for part in (first, row)])
