"""Rows of tokens, the order in which they are seen, and the batches that the model gets.

A step draws rows; how they are put into sequences and micro-batches is settled inside the step and changes nothing of
its loss. The order is a pure function of the seed and the epoch, so a resumed run needs no more than the number of its
step to go on with the very same rows.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tunery.rows import encoding
from tunery.rows.messages import Example, FileRole
from tunery.rows.template import IGNORED, ChatTemplate
from worker.trainer.kernels.attention import Borders

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Row:
    """One training row: token ids, and for each the id to learn or -100."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labelled(self) -> int:
        """Tokens that are predicted and learnt. The first one has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Rows:
    """A file's rows; the lines that were cut at the longest allowed length, and those left out of it."""

    rows: list[Row]
    truncated: tuple[int, ...] = ()
    unlearnable: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return [len(row) for row in self.rows]

    @cached_property
    def labelled(self) -> list[int]:
        """The labelled tokens of each row."""
        return [row.labelled for row in self.rows]

    @cached_property
    def sha256(self) -> str:
        """The digest of every token and label."""
        return self.digest(b"")

    def digest(self, before: bytes) -> str:
        digest = hashlib.sha256(before)
        for row in self.rows:
            digest.update(torch.tensor([row.input_ids, row.labels]).numpy().tobytes())
        return digest.hexdigest()


Packed = list[int]
"""Indexes of the rows in one sequence: one row, or several when packing."""
MicroBatch = list[Packed]
"""Sequences that pass through the model together."""
MOST_PADDING = 0.05
"""Share of padding up to which rows are a rectangle though their borders could be told: torch's attention over one is
up to 1.8 times as fast as that over rows of any length, and takes a tenth of the time of a step at 2,048 tokens."""
LINE_GRAIN, ENDS_GRAIN = 8, 16
"""Rows behind each other differ in their total from step to step more than rectangles do: a coarser grain keeps the
number of recorded shapes small."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device.

    `input_ids` [sequences, longest], padded at the right: causal attention never looks there, so no mask is needed.
    `position_ids`: only when a sequence holds several rows; they start anew with each, which is also how transformers
    knows to keep the rows apart; a model that can be told their `borders` reads these instead. `where` indexes the
    flattened positions that predict something, `targets` what.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    where: Tensor
    targets: Tensor
    tokens: int
    borders: Borders | None = None


def read_examples(path: Path, role: FileRole) -> Iterator[tuple[int, Example]]:
    """The file's examples with their line numbers. Raises InvalidTrainingFile."""
    with path.open("rb") as file:
        yield from encoding.read_examples(iter(lambda: file.read(_CHUNK_BYTES), b""), role)


def read_rows(path: Path, template: ChatTemplate, max_length: int, role: FileRole = "training") -> Rows:
    """Every example as tokens. Rows with nothing to learn are left out and counted.

    Raises InvalidTrainingFile, also when no row is left.
    """
    rows: list[Row] = []
    truncated: list[int] = []
    unlearnable: list[int] = []
    for number, example in read_examples(path, role):
        encoded = encoding.encode_example(template, example, number, max_length=max_length, role=role)
        rows += [Row(sequence.input_ids, sequence.labels) for sequence in encoded.sequences]
        if not encoded.sequences:
            unlearnable.append(number)
        elif encoded.truncated:
            truncated.append(number)
    if not rows:
        raise encoding.nothing_trained(role, max_length)
    return Rows(rows, tuple(truncated), tuple(unlearnable))


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The seeded order in which `count` rows are seen in an epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
    return shuffled


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """The last step of an epoch takes what is left, however little."""
    return -(-rows // batch_size)


def rows_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Indexes of the rows of a step (counted from 1), out of `count`."""
    epoch, place = divmod(step - 1, steps_per_epoch(count, batch_size))
    return order(count, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def micro_batches(
    rows: list[int],
    lengths: list[int],
    max_tokens: int,
    *,
    packed_tokens: int | None = None,
    groups: list[Hashable] | None = None,
) -> list[MicroBatch]:
    """Cuts rows into micro-batches of at most `max_tokens` tokens with their padding (or one row).

    `lengths` and `groups` hold a value for every row of the file; rows of different groups never share a micro-batch.
    `packed_tokens`: rows are packed into sequences of at most so many tokens first; None: a row a sequence.
    Within a step the order does not matter, as its loss is one sum; sorted by length, padding costs least.
    """
    apart: dict[Hashable, list[int]] = {}
    for i in rows:
        apart.setdefault(None if groups is None else groups[i], []).append(i)
    parts: list[MicroBatch] = []
    for together in apart.values():
        sequences = [[i] for i in together] if packed_tokens is None else pack(together, lengths, packed_tokens)
        parts += _cut(sequences, lengths, max_tokens)
    return parts


def _cut(sequences: list[Packed], lengths: list[int], max_tokens: int) -> list[MicroBatch]:
    """Sequences of like length together."""

    def length(sequence: Packed) -> int:
        return sum(lengths[i] for i in sequence)

    parts: list[MicroBatch] = []
    for sequence in sorted(sequences, key=length, reverse=True):
        if parts and (len(parts[-1]) + 1) * length(parts[-1][0]) <= max_tokens:
            parts[-1].append(sequence)
        else:
            parts.append([sequence])
    return parts


def pack(rows: list[int], lengths: list[int], capacity: int) -> list[Packed]:
    """Best-fit decreasing: each row goes into the fullest sequence that still has room for it.

    Sequences hold at most `capacity` tokens (a longer row stands alone). At most 11/9 of the fewest possible, plus 4
    (Johnson 1974); in practice within a few per cent. Why not in the order drawn: leftovers would be padding.
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
    rows: list[Row],
    sequences: MicroBatch,
    device: torch.device,
    grain: tuple[int, int] = (1, 1),
    *,
    borders: bool = False,
) -> Batch:
    """Sequences as one batch. Which positions predict is settled here, on the host, so the GPU is never asked.

    `grain`: the width and the number of targets are padded to multiples of these; targets of padding are -100.
    `borders`: the model can be told where rows begin, so they lie behind each other instead of being padded, unless
    they are of nearly the same length: attention over a rectangle is then the faster one.
    """
    marks = None
    if borders:
        together = [i for sequence in sequences for i in sequence]
        in_line = [len(rows[i]) for i in together]
        flat = len(in_line) * max(in_line) > (1 + MOST_PADDING) * sum(in_line)
        sequences = [together] if flat else [[i] for i in together]
        grain = (grain[0] * LINE_GRAIN, grain[1]) if flat and grain[0] > 1 else grain
        marks = _borders(in_line, grain[0], device) if flat else Borders()
    lengths = [sum(len(rows[i]) for i in sequence) for sequence in sequences]
    width = -(-max(lengths) // grain[0]) * grain[0]
    ids, positions, where, targets = _laid_out(rows, sequences, width)
    idle = -len(where) % grain[1]
    packed = any(len(sequence) > 1 for sequence in sequences)
    return Batch(
        input_ids=_move(ids, device),
        position_ids=_move(positions, device) if packed else None,
        where=_move(functional.pad(where, (0, idle)), device),
        targets=_move(functional.pad(targets, (0, idle), value=IGNORED), device),
        tokens=sum(lengths),
        borders=marks,
    )


def _laid_out(rows: list[Row], sequences: MicroBatch, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and positions [sequences, width], which flattened positions predict something, and what."""
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    positions = torch.zeros(len(sequences), width, dtype=torch.int64)
    where: list[Tensor] = []
    targets: list[Tensor] = []
    for number, sequence in enumerate(sequences):
        start = 0
        for row in (rows[i] for i in sequence):
            end = start + len(row)
            ids[number, start:end] = torch.tensor(row.input_ids)
            positions[number, start:end] = torch.arange(len(row))
            labels = torch.tensor(row.labels[1:])
            places = (labels != IGNORED).nonzero().flatten()
            where.append(places + (number * width + start))
            targets.append(labels[places])
            start = end
    return ids, positions, torch.cat(where), torch.cat(targets)


def _borders(lengths: list[int], grain: int, device: torch.device) -> Borders:
    """The borders of rows behind each other; what pads them to a multiple of `grain` is a row of its own.

    With a grain their number is padded too, by rows without a token, and the longest is rounded up: these are part of
    a shape that is recorded.
    """
    ends = [0, *accumulate(lengths)]
    padding = -ends[-1] % grain
    longest = max(*lengths, padding)
    if grain > 1:
        ends.append(ends[-1] + padding)
        ends += [ends[-1]] * (-len(ends) % ENDS_GRAIN)
        longest = 1 << (longest - 1).bit_length()
    return Borders(_move(torch.tensor(ends, dtype=torch.int32), device), longest)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
