"""A file's rows, parsed and encoded: the one loop of validation and trainer.

The texts of a batch of rows are rendered together, which saves most of what an exchange with the renderer costs, and
while the batch before it is tokenised.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tunery.failures import InvalidTrainingFile
from tunery.rows.encoding import Encoded, RowEncoder, read_rows
from tunery.rows.formats import SourceRow
from tunery.rows.messages import Example, FileRole
from tunery.rows.preferences import Pair
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

_MOST_ROWS = 32
_MOST_SIZE = 2**20
MANY_ROWS = 2000
"""Rows after which it pays to look for a faster tokeniser."""


@dataclass(frozen=True)
class Judged:
    """A row with what it teaches, or with its fault. `encoded` is None where there is no template."""

    number: int
    example: Example | None = None
    encoded: Encoded | None = None
    fault: InvalidTrainingFile | None = None


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
    """Every row in its order, in memory that does not grow with the file. Raises InvalidTrainingFile where the bytes
    are no rows, after the rows above them."""
    batches = _parse(read_rows(chunks, role, shape or FileShape(encoder.columns)), role, encoder)
    if template is None:
        yield from (row for batch in batches for row in batch)
        return
    for batch, prepared in _render_ahead(template, batches):
        for row in batch:
            yield _encode(row, prepared, role, encoder, max_length)
        if batch[-1].number >= MANY_ROWS:
            template.hasten()


def _parse(rows: Iterator[SourceRow], role: FileRole, encoder: RowEncoder) -> Iterator[_Batch]:
    batch: _Batch = []
    size = 0
    try:
        for source in rows:
            batch.append(_parse_row(source, role, encoder))
            size += _size(source.fields)
            if len(batch) == _MOST_ROWS or size > _MOST_SIZE:
                yield batch
                batch, size = [], 0
    except InvalidTrainingFile:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _size(value: object) -> int:
    """About the bytes that a JSON value takes: a row's numbers count as its texts do."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _size(item) + 32 for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 32


def _parse_row(source: SourceRow, role: FileRole, encoder: RowEncoder) -> Judged:
    try:
        return Judged(source.number, encoder.parse(source, role))
    except InvalidTrainingFile as fault:
        return Judged(source.number, fault=fault)


def _render_ahead(template: ChatTemplate, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, ChatTemplate]]:
    """Each batch with the template that has its texts, which a thread has rendered while the one before was used."""
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


def _encode(row: Judged, template: ChatTemplate, role: FileRole, encoder: RowEncoder, max_length: int) -> Judged:
    if row.example is None:
        return row
    try:
        encoded = encoder.encode(template, row.example, row.number, max_length=max_length, role=role)
    except InvalidTrainingFile as fault:
        return Judged(row.number, row.example, fault=fault)
    return Judged(row.number, row.example, encoded)
