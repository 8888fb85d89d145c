"""Reads a file's token examples, orders them, and builds the model's batches.

A step draws examples; how their rows form sequences and micro-batches is decided inside the step and does not change
its loss. The order is a pure function of the seed and the epoch, so a resumed run needs only its step's number to
continue with the very same examples.
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

import torch
from torch import Tensor
from torch.nn import functional

from tunery.rows import bulk, encoding, messages, readers
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

MOST_IN_MEMORY = 2 * 10**6
"""The most tokens of a file whose rows are kept as lists, which take a hundred bytes per token."""


@dataclass(frozen=True)
class Rows:
    """A file's examples, the lines truncated at the longest allowed length, and the lines left out.

    `found`: an earlier run on this host had prepared them.
    `replayed`: how many examples at the end are replay, of which an epoch has `replayed_an_epoch` (`replay.mixing`).
    """

    examples: list[Example] | StoredExamples
    truncated: tuple[int, ...] = ()
    unlearnable: tuple[int, ...] = ()
    replayed: int = 0
    replayed_an_epoch: int = 0
    found: bool = False

    @property
    def rows(self) -> Sequence[Row]:
        if isinstance(self.examples, StoredExamples):
            return self.examples.rows
        return [row for example in self.examples for row in example.rows]

    @property
    def count(self) -> int:
        """The number of the file's own examples, without replay, which make up an epoch."""
        return len(self.examples) - self.replayed

    @property
    def tokens(self) -> int:
        """Tokens of one epoch; for replay, the epochs' mean."""
        replay = sum(self.lengths[self.count :]) * self.replayed_an_epoch // max(1, self.replayed)
        return sum(self.lengths[: self.count]) + replay

    def tokens_a_step(self, batch_size: int, ranks: int = 1) -> float:
        """Returns the tokens of a mean step of `batch_size` of the file's own examples, on each of so many ranks."""
        return self.tokens / steps_per_epoch(self.count, batch_size) / ranks

    @cached_property
    def lengths(self) -> Sequence[int]:
        """How many tokens each example has."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.lengths
        return array("l", map(len, self.examples))

    @cached_property
    def sha256(self) -> str:
        """The digest of every token and label."""
        return self.digest(b"")

    def attach(self, reference: Sequence[Sequence[float]]) -> None:
        """Sets each example's `reference`."""
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
"""Indexes of the examples in one sequence: several when packing. The rows of a single example are sequences of their
own.
"""
MicroBatch = list[Packed]
"""Sequences that pass through the model together."""
PADDING = 0
"""The id of padding. Whatever a model computes of it, no row sees."""
MOST_PADDING = 0.05
"""Fraction of padding up to which rows form a rectangle even if their borders could be given: torch's attention over
one is up to 1.8 times as fast as that over rows of any length, and takes a tenth of a step's time at 2,048 tokens.
"""
CONCATENATED_TO, ALONE_TO = (8, 64), (16, 32)
"""Padding of recorded shapes whose tokens vary from step to step, as those of concatenated rows and of a row alone do:
to a multiple of this fraction of the largest power of two that the tokens reach, of so many tokens at least and of
MOST_PADDED at most. Few shapes are recorded, and little is padded. Targets are padded to a multiple of a fourth of it.
"""
MOST_PADDED, TARGETS_PAD_TO = 256, 4
RECTANGLES_TO = (32, 1)
"""What sequences beside each other are padded to on a GPU. cuDNN compiles its attention for each new length, which
takes a tenth of a second.
"""
FEW_ENDS, ENDS_PAD_TO, LEAST_LONGEST = 8, 16, 1024
"""Ends of concatenated rows are padded to FEW_ENDS or to a multiple of ENDS_PAD_TO. A recorded shape's longest row has
at least LEAST_LONGEST tokens, or as many as all rows have together.
"""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device.

    `input_ids` [sequences, longest], padded at the right: causal attention never looks there, so no mask is needed.
    `position_ids`: only if a sequence holds several rows; they restart with each row, by which transformers keeps the
    rows apart; a model that takes `borders` reads those instead. `label_positions`: the flattened positions that
    predict something, `targets`: the labels there. `labelled`: how many of these each row has, in the order of the
    examples and of their rows; the rest at the end is padding. `reference` [rows]: see `Example`. `lengths`: those of
    each sequence's rows. `mask` [sequences, 1, longest, longest]: what each position sees, if not all before it.
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
    """Encodes every line to examples of a method. Lines with nothing to learn are left out and recorded.

    Above MOST_IN_MEMORY tokens the examples are in a file beside `path`, or in `kept`, a folder of prepared rows that
    later runs reuse. Raises InvalidTrainingFile, also if no example is left.
    """
    reading = bulk.Reading(role, encoder, template, max_length)
    usable = kept is not None and os.access(kept, os.W_OK)
    name = prepared.key(path, template, encoder, role, max_length) if usable else None
    if kept is None or name is None:
        return _prepare(path, reading)
    with prepared.turn(kept, name):
        is_kept = (found := prepared.find(kept, name)) is not None
        if found is None:
            rows = _prepare(path, reading)
            store = store_of(rows.examples, path.parent)
            whole = store, rows.truncated, rows.unlearnable
            prepared.save(kept, name, whole)
            found = prepared.find(kept, name) or whole  # so that a large file's tokens are on disk once
        store, truncated, unlearnable = found
    return Rows(read_back(store, MOST_IN_MEMORY), truncated, unlearnable, found=is_kept)


def _prepare(path: Path, reading: bulk.Reading) -> Rows:
    lines = _Lines()
    examples = keep(lines.read(path, reading), path.parent, MOST_IN_MEMORY)
    if not examples:
        raise encoding.nothing_trained(reading.role, reading.max_length)
    return Rows(examples, tuple(lines.truncated), tuple(lines.unlearnable))


class _Lines:
    """Reads a file's lines, and records which were truncated and which left out."""

    def __init__(self) -> None:
        self.truncated: list[int] = []
        self.unlearnable: list[int] = []

    def read(self, path: Path, reading: bulk.Reading) -> Iterator[Block]:
        """Yields the examples. Raises InvalidTrainingFile."""
        with closing(bulk.digest_rows(readers.chunks_of(path), reading, gather)) as blocks:
            for block in blocks:
                if block.fault is not None:
                    raise block.fault
                self.truncated += block.truncated
                self.unlearnable += block.unlearnable
                yield block


def read_parsed(
    path: Path, role: FileRole, encoder: encoding.RowEncoder = encoding.CHATS
) -> Iterator[tuple[int, messages.Example]]:
    """Yields the file's parsed lines with their numbers. Raises InvalidTrainingFile."""
    for row in encoding.read_rows(readers.chunks_of(path), role, FileShape(encoder.columns)):
        yield row.number, encoder.parse(row, role)


@lru_cache(2)  # one for the task, one for replay: each step asks for both, and a million rows take 50 ms to shuffle
def order(count: int, seed: int, epoch: int) -> list[int]:
    """Returns the seeded order in which `count` examples are seen in an epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
    return shuffled


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Returns how many steps an epoch has; the last one takes what is left, however little."""
    return -(-rows // batch_size)


def rows_of_step(count: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Returns the indexes of a step's examples (steps counted from 1), out of `count`."""
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
    """Splits examples into micro-batches of at most `max_tokens` tokens with padding (or of one example).

    `lengths`, `groups` and `shapes` hold a value for every example of the file. Examples of different groups never
    share a micro-batch. `shapes`: an example's number of rows and its longest; None: one row of its length.
    `packed_tokens`: examples are first packed into sequences of at most this many tokens; None: one row a sequence.
    Within a step the order does not matter, as its loss is one sum; sorting by length minimises padding.
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
    """Groups sequences of similar length."""

    def shape(packed: Packed) -> tuple[int, int]:
        """Returns how many sequences it becomes, and the length of the longest."""
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


def share(rows: list[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Returns each rank's examples, by length: the longest first, each goes to the rank with the fewest tokens.

    The busiest has at most 4/3 of the fewest tokens that it could have (Graham 1969), and never more than the longest
    `ceil(rows / ranks)` examples have together, for which the memory plan is made.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for i in sorted(rows, key=lambda i: lengths[i], reverse=True):
        rank = tokens.index(min(tokens))
        shares[rank].append(i)
        tokens[rank] += lengths[i]
    return shares


def pack(rows: list[int], lengths: Sequence[int], capacity: int) -> list[Packed]:
    """Packs examples by best-fit decreasing: each goes into the fullest sequence that still has room for it.

    Sequences hold at most `capacity` tokens (a longer example is alone). There are at most 11/9 of the fewest possible,
    plus 4 (Johnson 1974); in practice a few per cent more. Why not in the order drawn: gaps would be padding.
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
    """Builds a micro-batch. Which positions predict is decided here, on the host, without waiting for the GPU.

    `pad_to`: the width and the number of targets are padded to multiples of these; targets of padding are -100. Targets
    are padded where a pass is recorded, and concatenated rows then alone.
    `borders`: the model accepts the places where rows begin, so rows are concatenated without padding, unless they are
    of nearly equal length: attention over a rectangle is then faster.
    """
    sequences = _sequences(examples, part)
    marks = None
    if borders:
        together = [row for sequence in sequences for row in sequence]
        in_line = [len(row) for row in together]
        flat = len(in_line) * max(in_line) > (1 + MOST_PADDING) * sum(in_line)
        sequences = [together] if flat else [[row] for row in together]
        if flat and pad_to[1] == 1:
            pad_to = 1, 1
        elif pad_to[1] > 1 and (flat or len(in_line) == 1):
            step = _step(sum(in_line), *(CONCATENATED_TO if flat else ALONE_TO))
            pad_to = step, _up(sum(in_line), step) // TARGETS_PAD_TO
        marks = _borders(in_line, pad_to[0], device) if flat else Borders()
    lengths = [sum(map(len, sequence)) for sequence in sequences]
    width = _up(max(lengths), pad_to[0])
    ids, positions, label_positions, targets = _laid_out(sequences, width)
    labelled = tuple(len(places) for places in label_positions)
    idle = -sum(labelled) % pad_to[1]
    packed = any(len(sequence) > 1 for sequence in sequences)
    return Batch(
        input_ids=move(ids, device),
        position_ids=move(positions, device) if packed else None,
        label_positions=move(functional.pad(torch.cat(label_positions), (0, idle)), device),
        targets=move(functional.pad(torch.cat(targets), (0, idle), value=IGNORED), device),
        tokens=sum(lengths),
        labelled=labelled,
        borders=marks,
        reference=_reference(examples, part, device),
        lengths=tuple(tuple(map(len, sequence)) for sequence in sequences),
    )


def _step(tokens: int, part: int, least: int) -> int:
    """Returns of which number the padded tokens are a multiple."""
    return min(MOST_PADDED, max(least, (1 << tokens.bit_length() - 1) // part))


def _up(number: int, step: int) -> int:
    """Returns the number rounded up to a multiple of `step`."""
    return -(-number // step) * step


def _reference(examples: Sequence[Example], part: MicroBatch, device: torch.device) -> Tensor | None:
    numbers = [number for packed in part for i in packed for number in examples[i].reference]
    return move(torch.tensor(numbers), device) if numbers else None


def _sequences(examples: Sequence[Example], part: MicroBatch) -> list[list[Row]]:
    """Returns each sequence's rows, in order. An example that shares its sequence with no other is not packed."""
    sequences: list[list[Row]] = []
    for packed in part:
        rows = [row for i in packed for row in examples[i].rows]
        sequences += [rows] if len(packed) > 1 else [[row] for row in rows]
    return sequences


def _laid_out(sequences: list[list[Row]], width: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Returns ids and positions [sequences, width]; for each row, the flattened positions that predict, and their
    labels.
    """
    ids = torch.full((len(sequences), width), PADDING)
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
    """Returns the borders of concatenated rows; the padding to a multiple of `pad_to` is a row of its own.

    With padding, the number of rows is padded too, by rows without a token, and the longest is rounded up: both are
    part of a recorded shape. A kernel's blocks beyond the end of a row cost little, but not nothing.
    """
    ends = [0, *accumulate(lengths)]
    padding = -ends[-1] % pad_to
    longest = max(*lengths, padding)
    if pad_to > 1:
        ends.append(ends[-1] + padding)
        ends += [ends[-1]] * (-len(ends) % (FEW_ENDS if len(ends) <= FEW_ENDS else ENDS_PAD_TO))
        longest = 1 << (max(longest, min(ends[-1], LEAST_LONGEST), ends[-1] // 4) - 1).bit_length()
    return Borders(move(torch.tensor(ends, dtype=torch.int32), device), longest)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
