"""Rows of tokens, the order in which they are seen, and the batches that the model gets.

A *unit* is what fills one sequence: one row, or several when packing. The order is a pure function of the seed and the
epoch, so a resumed run needs no more than the number of its step to go on with the very same rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunery.errors import InvalidTrainingFile
from tunery.rows.encoding import encode_example
from tunery.rows.messages import Example, FileRole, parse_line
from tunery.rows.template import IGNORED, ChatTemplate


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
    """A file's rows; the lines of those that were cut at the longest allowed length, and of those left out."""

    rows: list[Row]
    truncated: tuple[int, ...] = ()
    unlearnable: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


Unit = list[int]
"""Indexes of the rows in one sequence."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device.

    `input_ids` [sequences, longest], padded at the right: causal attention never looks there, so no mask is needed.
    `position_ids`: only when a sequence holds several rows; they start anew with each, which is also how transformers
    knows to keep the rows apart. `where` indexes the flattened positions that predict something, `targets` what.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    where: Tensor
    targets: Tensor
    tokens: int


def read_examples(path: Path, role: FileRole) -> Iterator[tuple[int, Example]]:
    """The file's examples with their line numbers. Raises InvalidTrainingFile."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_line(line, number, role)


def read_rows(path: Path, template: ChatTemplate, max_length: int, role: FileRole = "training") -> Rows:
    """Every example as tokens. Rows with nothing to learn are left out and counted.

    Raises InvalidTrainingFile, also when no row is left.
    """
    rows: list[Row] = []
    truncated: list[int] = []
    unlearnable: list[int] = []
    for number, example in read_examples(path, role):
        for rendered in encode_example(template, example, number, max_length=max_length, role=role):
            row = Row(list(rendered.input_ids), list(rendered.labels))
            if not row.labelled:
                unlearnable.append(number)
                continue
            rows.append(row)
            if rendered.truncated:
                truncated.append(number)
    if not rows:
        raise InvalidTrainingFile(
            role=role, reason=f"No row has a trained token within max_seq_length ({max_length}). Raise max_seq_length."
        )
    return Rows(rows, tuple(truncated), tuple(unlearnable))


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The seeded order in which `count` units are seen in an epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
    return shuffled


def steps_per_epoch(units: int, batch_size: int) -> int:
    """The last step of an epoch takes what is left, however little."""
    return -(-units // batch_size)


def units_of_step(units: list[Unit], step: int, batch_size: int, seed: int) -> list[Unit]:
    """The units of a step (counted from 1)."""
    epoch, place = divmod(step - 1, steps_per_epoch(len(units), batch_size))
    chosen = order(len(units), seed, epoch)[place * batch_size : (place + 1) * batch_size]
    return [units[i] for i in chosen]


def micro_batches(units: list[Unit], lengths: list[int], budget: int) -> list[list[Unit]]:
    """Units of like length together, each micro-batch at most `budget` tokens with its padding (or one unit).

    Within a step the order does not matter, as its loss is one sum; sorted by length, padding costs least.
    """

    def length(unit: Unit) -> int:
        return sum(lengths[i] for i in unit)

    parts: list[list[Unit]] = []
    for unit in sorted(units, key=length, reverse=True):
        if parts and (len(parts[-1]) + 1) * length(parts[-1][0]) <= budget:
            parts[-1].append(unit)
        else:
            parts.append([unit])
    return parts


def collate(rows: list[Row], units: list[Unit], device: torch.device, grain: tuple[int, int] = (1, 1)) -> Batch:
    """Units as one padded batch. Which positions predict is settled here, on the host, so the GPU is never asked.

    `grain`: the width and the number of targets are padded to multiples of these; targets of padding are -100.
    """
    lengths = [sum(len(rows[i]) for i in unit) for unit in units]
    width = -(-max(lengths) // grain[0]) * grain[0]
    ids = torch.zeros(len(units), width, dtype=torch.int64)
    positions = torch.zeros(len(units), width, dtype=torch.int64)
    where: list[Tensor] = []
    targets: list[Tensor] = []
    for number, unit in enumerate(units):
        start = 0
        for row in (rows[i] for i in unit):
            end = start + len(row)
            ids[number, start:end] = torch.tensor(row.input_ids)
            positions[number, start:end] = torch.arange(len(row))
            labels = torch.tensor(row.labels[1:])
            places = (labels != IGNORED).nonzero().flatten()
            where.append(places + (number * width + start))
            targets.append(labels[places])
            start = end
    packed = any(len(unit) > 1 for unit in units)
    idle = -sum(map(len, where)) % grain[1]
    where.append(torch.zeros(idle, dtype=torch.int64))
    targets.append(torch.full((idle,), IGNORED))
    return Batch(
        input_ids=_move(ids, device),
        position_ids=_move(positions, device) if packed else None,
        where=_move(torch.cat(where), device),
        targets=_move(torch.cat(targets), device),
        tokens=sum(lengths),
    )


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
