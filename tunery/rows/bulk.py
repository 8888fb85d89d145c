"""Parses and encodes a file's rows: the loop that validation and trainer share.

The texts of a group of rows are rendered in one request, which saves most of the renderer's overhead, and while the
previous group is tokenised. Groups of a large file are prepared by several processes (`preparers`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, TypeVar

from tunery.failures import InvalidTrainingFile
from tunery.rows import jsonl, preparers
from tunery.rows.encoding import Encoded, RowEncoder, split_rows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole
from tunery.rows.preferences import Pair
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

T = TypeVar("T")

_MOST_ROWS = 32
_MOST_SIZE = 2**20
MANY_ROWS = 2000
"""Rows from which a faster tokeniser is worth preparing."""
PROCESSES_FROM = 8000
"""Rows from which processes are worth starting; each takes two seconds."""


class Judged(NamedTuple):
    """A row with its encoding, or with its fault. `number`, `name`: see `SourceRow`. `encoded` is None without a
    template."""

    number: int
    name: str
    example: Example | None = None
    encoded: Encoded | None = None
    fault: InvalidTrainingFile | None = None


@dataclass(frozen=True)
class Reading:
    """How a file is read: its role, its method's encoder, and the template with the token limit of a row."""

    role: FileRole
    encoder: RowEncoder
    template: ChatTemplate | None
    max_length: int


Digest = Callable[[Iterator[Judged]], T]
"""Reduces a group of rows, which are encoded as they are iterated, to what the caller needs. Function and result must
be picklable."""
_Group = list[SourceRow]
_Batch = list[Judged]


def encode_rows(
    chunks: Iterable[bytes],
    role: FileRole,
    encoder: RowEncoder,
    template: ChatTemplate | None,
    *,
    max_length: int,
    shape: FileShape | None = None,
) -> Iterator[Judged]:
    """Yields every row in order, in constant memory. Raises InvalidTrainingFile where the bytes are not rows, after the
    rows before them."""
    rows = split_rows(chunks, role, shape or FileShape(encoder.columns))
    for group in _encode_groups(_group(rows, _MOST_ROWS), Reading(role, encoder, template, max_length)):
        yield from group


def digest_rows(
    chunks: Iterable[bytes], reading: Reading, digest: Digest[T], shape: FileShape | None = None
) -> Generator[T]:
    """Yields the result of `digest` for each group of rows, in order; faster than `encode_rows` for large files."""
    shape = shape or FileShape(reading.encoder.columns)
    rows = split_rows(chunks, reading.role, shape)
    first = islice(rows, PROCESSES_FROM) if reading.template is not None else rows
    for encoded in _encode_groups(_group(first, _MOST_ROWS), reading):
        yield digest(encoded)
    rest = _group(rows, preparers.ROWS)
    if (group := next(rest, None)) is None:
        return
    # Until a row has fixed the file's shape, separate processes could each detect a different one.
    count = preparers.COUNT if shape.shape is not None else 1
    with preparers.Preparers(partial(_digest_group, reading, digest), count) as some:
        for found, used in some.map(chain([group], rest)):
            shape.used |= used
            yield found


def _digest_group(reading: Reading, digest: Digest[T], group: _Group) -> tuple[T, dict[str, str]]:
    """Returns the result of `digest` for a group, and the keys that were read from its rows."""
    assert reading.template is not None, "without one the file has been read"
    reading.template.hasten()
    batch = [_parse_row(source, reading) for source in group]
    prepared = reading.template.render_ahead(_chats(batch))
    found = digest(_encode(row, prepared, reading) for row in batch)
    return found, group[0].shape.used if group[0].shape is not None else {}


def _group(rows: Iterator[SourceRow], most_rows: int) -> Iterator[_Group]:
    group: _Group = []
    size = 0
    try:
        for source in rows:
            group.append(source)
            size += _size(source)
            if len(group) == most_rows or size > _MOST_SIZE:
                yield group
                group, size = [], 0
    except InvalidTrainingFile:
        if group:
            yield group
        raise
    if group:
        yield group


def _size(source: SourceRow) -> int:
    """Returns the approximate bytes of a row's values, numbers included."""
    if source.text is not None:
        return len(source.text) + source.text.count(",") * 32
    return _size_of(source.fields)


def _size_of(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _size_of(item) + 32 for key, item in value.items())
    return sum(map(_size_of, value)) if isinstance(value, list) else 32


def _encode_groups(groups: Iterator[_Group], reading: Reading) -> Iterator[Iterator[Judged]]:
    batches = ([_parse_row(source, reading) for source in group] for group in groups)
    if reading.template is None:
        yield from map(iter, batches)
        return
    rows = 0
    for batch, prepared in _render_ahead(reading.template, batches):
        yield (_encode(row, prepared, reading) for row in batch)
        rows += len(batch)
        if rows >= MANY_ROWS:
            reading.template.hasten()


def _parse_row(source: SourceRow, reading: Reading) -> Judged:
    row = Judged(source.number, source.name)
    try:
        return row._replace(example=reading.encoder.parse(jsonl.parse(source), reading.role))
    except InvalidTrainingFile as fault:
        return row._replace(fault=fault)


def _render_ahead(template: ChatTemplate, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, ChatTemplate]]:
    """Yields each batch with a template that has its texts, which a thread renders while the previous batch is used."""
    with ThreadPoolExecutor(1) as thread:
        before: tuple[_Batch, Future[ChatTemplate]] | None = None
        try:
            for batch in batches:
                coming = thread.submit(template.render_ahead, _chats(batch))
                if before is not None:
                    yield before[0], before[1].result()
                before = batch, coming
        except InvalidTrainingFile:
            if before is not None:
                yield before[0], before[1].result()
            raise
        if before is not None:
            yield before[0], before[1].result()


def _chats(batch: _Batch) -> list[Example]:
    examples = [row.example for row in batch if row.example is not None]
    return examples + [example.rejected for example in examples if isinstance(example, Pair)]


def _encode(row: Judged, template: ChatTemplate, reading: Reading) -> Judged:
    if row.example is None:
        return row
    try:
        encoded = reading.encoder.encode(
            template, row.example, row.name, max_length=reading.max_length, role=reading.role
        )
    except InvalidTrainingFile as fault:
        return row._replace(fault=fault)
    return row._replace(encoded=encoded)
