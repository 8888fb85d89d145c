"""Examples of tokens, the order in which they are seen, and the batches that the model gets.

A step draws examples; how their rows are put into sequences and micro-batches is decided inside the step and changes
nothing of its loss. The order is a pure function of the seed and the epoch, so a resumed run needs no more than the
number of its step to go on with the very same examples.
"""

import hashlib
import os
from array import array
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.nn import functional

from tunery.rows import bulk, encoding, messages
from tunery.rows.messages import FileRole
from tunery.rows.shapes import FileShape
from tunery.rows.template import IGNORED, ChatTemplate
from worker.trainer import prepared
from worker.trainer.blocks import Block, gather
from worker.trainer.kernels.attention import Borders
from worker.trainer.row import Example as Example
from worker.trainer.row import Row as Row
from worker.trainer.row import singles as singles
from worker.trainer.stored_rows import StoredExamples, keep, read_back, store_of

_CHUNK_BYTES = 2**20
MOST_IN_MEMORY = 2 * 10**6
"""Tokens of a file whose rows are held as lists, which take a hundred bytes for each."""


@dataclass(frozen=True)
class Rows:
    """A file's examples; the lines that were cut at the longest allowed length, and those left out of it.

    `replayed`: the last so many examples are replay, `replayed_an_epoch` of which an epoch has (`replay.mixing`).
    """

    examples: list[Example] | StoredExamples
    truncated: tuple[int, ...] = ()
    unlearnable: tuple[int, ...] = ()
    replayed: int = 0
    replayed_an_epoch: int = 0

    @property
    def rows(self) -> Sequence[Row]:
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows
        return [row for example in self.examples for row in example.rows]

    @property
    def count(self) -> int:
        """The examples of the file, which an epoch counts: those without replay."""
        return len(self.examples) - self.replayed

    @property
    def tokens(self) -> int:
        """Of one epoch; of replay, the epochs' mean."""
        replay = sum(self.lengths[self.count :]) * self.replayed_an_epoch // max(1, self.replayed)
        return sum(self.lengths[: self.count]) + replay

    @cached_property
    def lengths(self) -> Sequence[int]:
        """The tokens of each example."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.lengths
        return array("l", map(len, self.examples))

    @cached_property
    def sha256(self) -> str:
        """The digest of every token and label."""
        return self.digest(b"")

    def attach(self, reference: Sequence[Sequence[float]]) -> None:
        """Gives each example its `reference`."""
        if isinstance(self.examples, StoredExamples):
            self.examples.attach(reference)
            return
        pairs = zip(self.examples, reference, strict=True)
        self.examples[:] = [replace(example, reference=tuple(found)) for example, found in pairs]

    def digest(self, before: bytes) -> str:
        digest = hashlib.sha256(before)
        for row in self.rows:
            digest.update(torch.tensor([row.input_ids, row.labels]).numpy().tobytes())
        return digest.hexdigest()


Packed = list[int]
"""Indexes of the examples in one sequence: several when packing. The rows of one alone are sequences of their own."""
MicroBatch = list[Packed]
"""What passes through the model together."""
MOST_PADDING = 0.05
"""Share of padding up to which rows are a rectangle though their borders could be given: torch's attention over one is
up to 1.8 times as fast as that over rows of any length, and takes a tenth of the time of a step at 2,048 tokens."""
PACKED_PAD_FACTOR, ENDS_PAD_TO = 8, 16
"""Rows behind each other differ in their total from step to step more than rectangles do: coarser padding keeps the
number of recorded shapes small."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device.

    `input_ids` [sequences, longest], padded at the right: causal attention never looks there, so no mask is needed.
    `position_ids`: only when a sequence holds several rows; they start again with each, which is also how transformers
    knows to keep the rows apart; a model that takes their `borders` reads these instead. `label_positions`: the
    flattened positions that predict something, `targets`: what. `labelled`: how many of these each row has, in the
    order of the examples and of their rows; what is left at the end is padding. `reference` [rows]: see `Example`.
    `lengths`: those of each sequence's rows. `mask` [sequences, 1, longest, longest]: what each position sees, where
    that is not all before it.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    label_positions: Tensor
    targets: Tensor
    tokens: int
    labelled: tuple[int, ...]
    borders: Borders | None = None
    mask: Tensor | None = None
    reference: Tensor | None = None
    lengths: tuple[tuple[int, ...], ...] = ()


def read_rows(
    path: Path,
    template: ChatTemplate,
    max_length: int,
    role: FileRole = "training",
    encoder: encoding.RowEncoder = encoding.CHATS,
    kept: Path | None = None,
) -> Rows:
    """Returns every line as examples, by the encoder of a method. Lines with nothing to learn are left out and counted.

    Of more than MOST_IN_MEMORY tokens the examples lie in a file beside `path`, or in `kept`: a folder of rows that
    were prepared before, which are not prepared again. Raises InvalidTrainingFile, also when no example is left.
    """
    reading = bulk.Reading(role, encoder, template, max_length)
    usable = kept is not None and os.access(kept, os.W_OK)
    name = prepared.key(path, template, encoder, role, max_length) if usable else None
    if kept is None or name is None:
        return _prepare(path, reading)
    with prepared.turn(kept, name):
        if (found := prepared.find(kept, name)) is None:
            rows = _prepare(path, reading)
            store = store_of(rows.examples, path.parent)
            whole = store, rows.truncated, rows.unlearnable
            prepared.save(kept, name, whole)
            found = prepared.find(kept, name) or whole  # so that a large file's tokens lie on the disk once
        store, truncated, unlearnable = found
    return Rows(read_back(store, MOST_IN_MEMORY), truncated, unlearnable)


def _prepare(path: Path, reading: bulk.Reading) -> Rows:
    lines = _Lines()
    examples = keep(lines.read(path, reading), path.parent, MOST_IN_MEMORY)
    if not examples:
        raise encoding.nothing_trained(reading.role, reading.max_length)
    return Rows(examples, tuple(lines.truncated), tuple(lines.unlearnable))


class _Lines:
    """Reads a file's lines, and keeps which of them were cut and which left out."""

    def __init__(self) -> None:
        self.truncated: list[int] = []
        self.unlearnable: list[int] = []

    def read(self, path: Path, reading: bulk.Reading) -> Iterator[Block]:
        """The examples. Raises InvalidTrainingFile."""
        with path.open("rb") as file, closing(bulk.digest_rows(_chunks(file), reading, gather)) as blocks:
            for block in blocks:
                if block.fault is not None:
                    raise block.fault
                self.truncated += block.truncated
                self.unlearnable += block.unlearnable
                yield block


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def read_parsed(
    path: Path, role: FileRole, encoder: encoding.RowEncoder = encoding.CHATS
) -> Iterator[tuple[int, messages.Example]]:
    """The file's lines, parsed, with their numbers. Raises InvalidTrainingFile."""
    with path.open("rb") as file:
        for row in encoding.read_rows(_chunks(file), role, FileShape(encoder.columns)):
            yield row.number, encoder.parse(row, role)


@lru_cache(2)  # of the task and of replay: a million rows take 50 ms to shuffle, which each step asks for
def order(count: int, seed: int, epoch: int) -> list[int]:
    """Returns the seeded order in which `count` examples are seen in an epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
    return shuffled


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Returns how many steps an epoch has; its last one takes what is left, however little."""
    return -(-rows // batch_size)


def rows_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Returns indexes of the examples of a step (counted from 1), out of `count`."""
    epoch, place = divmod(step - 1, steps_per_epoch(count, batch_size))
    return order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def micro_batches(
    rows: list[int],
    lengths: Sequence[int],
    max_tokens: int,
    *,
    packed_tokens: int | None = None,
    groups: list[Hashable] | None = None,
    shapes: list[tuple[int, int]] | None = None,
) -> list[MicroBatch]:
    """Cuts examples into micro-batches of at most `max_tokens` tokens with their padding (or one example).

    `lengths`, `groups` and `shapes` hold a value for every example of the file. Examples of different groups never
    share a micro-batch. `shapes`: how many rows an example has, and the longest; None: one of its length.
    `packed_tokens`: examples are packed into sequences of at most so many tokens first; None: a row a sequence.
    Within a step the order does not matter, as its loss is one sum; sorted by length, padding costs least.
    """
    apart: dict[Hashable, list[int]] = {}
    for i in rows:
        apart.setdefault(None if groups is None else groups[i], []).append(i)
    parts: list[MicroBatch] = []
    for together in apart.values():
        sequences = [[i] for i in together] if packed_tokens is None else pack(together, lengths, packed_tokens)
        parts += _cut(sequences, lengths, max_tokens, shapes)
    return parts


def _cut(
    sequences: list[Packed], lengths: Sequence[int], max_tokens: int, shapes: list[tuple[int, int]] | None
) -> list[MicroBatch]:
    """Sequences of like length together."""

    def shape(packed: Packed) -> tuple[int, int]:
        """Returns how many sequences it becomes, and the longest."""
        if shapes is not None and len(packed) == 1:
            return shapes[packed[0]]
        return 1, sum(lengths[i] for i in packed)

    parts: list[MicroBatch] = []
    height = width = 0
    for packed in sorted(sequences, key=lambda packed: shape(packed)[1], reverse=True):
        count, length = shape(packed)
        if parts and (height + count) * width <= max_tokens:
            parts[-1].append(packed)
            height += count
        else:
            parts.append([packed])
            height, width = count, length
    return parts


def pack(rows: list[int], lengths: Sequence[int], capacity: int) -> list[Packed]:
    """Best-fit decreasing: each example goes into the fullest sequence that still has room for it.

    Sequences hold at most `capacity` tokens (a longer example stands alone). At most 11/9 of the fewest possible, plus
    4 (Johnson 1974); in practice within a few per cent. Why not in the order drawn: leftovers would be padding.
    """
    packed: list[Packed] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, sequence), sorted
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        found = bisect_left(rooms, (lengths[i], -1))
        room, sequence = rooms.pop(found) if found < len(rooms) else (capacity, len(packed))
        if sequence == len(packed):
            packed.append([])
        packed[sequence].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], sequence))
    return packed


def collate(
    examples: Sequence[Example],
    part: MicroBatch,
    device: torch.device,
    pad_to: tuple[int, int] = (1, 1),
    *,
    borders: bool = False,
) -> Batch:
    """A micro-batch of the examples. Which positions predict is decided here, on the host, so the GPU is never asked.

    `pad_to`: the width and the number of targets are padded to multiples of these; targets of padding are -100.
    `borders`: the model takes the places where rows begin, so these lie behind each other unpadded, unless
    they are of nearly the same length: attention over a rectangle is then the faster one.
    """
    sequences = _sequences(examples, part)
    marks = None
    if borders:
        together = [row for sequence in sequences for row in sequence]
        in_line = [len(row) for row in together]
        flat = len(in_line) * max(in_line) > (1 + MOST_PADDING) * sum(in_line)
        sequences = [together] if flat else [[row] for row in together]
        pad_to = (pad_to[0] * PACKED_PAD_FACTOR, pad_to[1]) if flat and pad_to[0] > 1 else pad_to
        marks = _borders(in_line, pad_to[0], device) if flat else Borders()
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    width = -(-max(lengths) // pad_to[0]) * pad_to[0]
    ids, positions, label_positions, targets = _laid_out(sequences, width)
    labelled = tuple(len(places) for places in label_positions)
    idle = -sum(labelled) % pad_to[1]
    packed = any(len(sequence) > 1 for sequence in sequences)
    return Batch(
        input_ids=_move(ids, device),
        position_ids=_move(positions, device) if packed else None,
        label_positions=_move(functional.pad(torch.cat(label_positions), (0, idle)), device),
        targets=_move(functional.pad(torch.cat(targets), (0, idle), value=IGNORED), device),
        tokens=sum(lengths),
        labelled=labelled,
        borders=marks,
        reference=_reference(examples, part, device),
        lengths=tuple(tuple(map(len, sequence)) for sequence in sequences),
    )


def _reference(examples: Sequence[Example], part: MicroBatch, device: torch.device) -> Tensor | None:
    numbers = [number for packed in part for i in packed for number in examples[i].reference]
    return _move(torch.tensor(numbers), device) if numbers else None


def _sequences(examples: Sequence[Example], part: MicroBatch) -> list[list[Row]]:
    """The rows of each sequence, in order. Those of an example that was packed with no other need not be packed."""
    sequences: list[list[Row]] = []
    for packed in part:
        rows = [row for i in packed for row in examples[i].rows]
        sequences += [rows] if len(packed) > 1 else [[row] for row in rows]
    return sequences


def _laid_out(sequences: list[list[Row]], width: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Ids and positions [sequences, width]; for each row, which flattened positions predict something, and what."""
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    positions = torch.zeros(len(sequences), width, dtype=torch.int64)
    label_positions: list[Tensor] = []
    targets: list[Tensor] = []
    for number, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            end = start + len(row)
            ids[number, start:end] = torch.tensor(row.input_ids)
            positions[number, start:end] = torch.arange(len(row))
            labels = torch.tensor(row.labels[1:])
            places = (labels != IGNORED).nonzero().flatten()
            label_positions.append(places + (number * width + start))
            targets.append(labels[places])
            start = end
    return ids, positions, label_positions, targets


def _borders(lengths: list[int], pad_to: int, device: torch.device) -> Borders:
    """Returns the borders of rows behind each other; what pads them to a multiple of `pad_to` is a row of its own.

    When padded, their number is padded too, by rows without a token, and the longest is rounded up: these are part of
    a shape that is recorded.
    """
    ends = [0, *accumulate(lengths)]
    padding = -ends[-1] % pad_to
    longest = max(*lengths, padding)
    if pad_to > 1:
        ends.append(ends[-1] + padding)
        ends += [ends[-1]] * (-len(ends) % ENDS_PAD_TO)
        longest = 1 << (longest - 1).bit_length()
    return Borders(_move(torch.tensor(ends, dtype=torch.int32), device), longest)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
