"""Reads Parquet. Its footer is at the file's end, so the bytes are kept in a temporary file first."""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from tunery.rows import strict_json
from tunery.rows.compression import MOST_RATIO, RATIO_FROM
from tunery.rows.errors import InvalidRows
from tunery.rows.formats import Format, SourceRow
from tunery.rows.jsonl import MAX_LINE_BYTES
from tunery.rows.tables import MOST_COLUMNS

_IN_MEMORY = 8 * 2**20
_BATCH_ROWS = 64
_BATCH_BYTES = 64 * 2**20
_MOST_REPEATED = 1000
_MOST_FOOTER = 64 * 2**20
_MOST_DEPTH = 64


class ParquetParser:
    """Reads the complete file in small batches of rows. A column without a value, or with NaN, is absent."""

    def __init__(self) -> None:
        self._bytes = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (it lives as long as the parser)
        self._number = self._read = self._written = 0

    def feed(self, chunk: bytes) -> Iterator[SourceRow]:
        """Keeps the bytes; yields nothing, as no row is complete before the file's end."""
        self._bytes.write(chunk)
        self._read += len(chunk)
        yield from ()

    def close(self) -> Iterator[SourceRow]:
        """Yields all rows. Raises InvalidRows if the file is damaged or has implausibly many columns."""
        # Imported here because it is heavy and rarely needed.
        import pyarrow

        try:
            for batch in self._batches():
                yield from map(self._row, batch.to_pylist())
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise self._refuse(f"the file is damaged or incomplete: {reason}") from None
        finally:
            self._bytes.close()
        if not self._number:
            raise self._refuse("the file has no rows.")

    def _batches(self) -> Iterator[Any]:
        from pyarrow import parquet

        # Page by page and with a limited footer, because a small file can declare huge sizes.
        limits = {"thrift_string_size_limit": _MOST_FOOTER, "thrift_container_size_limit": 10**6}
        self._bytes.seek(0)
        file = parquet.ParquetFile(
            self._bytes, pre_buffer=False, buffer_size=2**20, schema_depth_limit=_MOST_DEPTH, **limits
        )
        if (columns := len(file.schema_arrow.names)) > MOST_COLUMNS or file.metadata.num_columns > MOST_COLUMNS:
            raise self._refuse(
                f"the table has {columns} columns, more than {MOST_COLUMNS}. Keep only the columns that are used."
            )
        if twice := _name_twice(file.schema_arrow):
            raise self._refuse(f"two columns have the name '{twice[:40]}'. Rename one of them.")
        for group in range(file.num_row_groups):
            rows = self._rows_at_once(file.metadata.row_group(group))
            yield from file.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)

    def _rows_at_once(self, group: Any) -> int:
        """Returns how many rows of a group to expand together: all may refer to one value, as large as the column."""
        columns = [group.column(place) for place in range(group.num_columns)]
        sizes: list[int] = [column.total_uncompressed_size for column in columns]
        for column, size in zip(columns, sizes, strict=True):
            if size > RATIO_FROM and size > MOST_RATIO * column.total_compressed_size:
                raise self._refuse(f"a column expands to more than {MOST_RATIO} times its size. Send it uncompressed.")
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, *sizes)))

    def _row(self, values: dict[str, Any]) -> SourceRow:
        self._number += 1
        try:
            text = json.dumps({key: _plain(value) for key, value in values.items()}, default=str)
            self._count(len(text))
            if len(text) > MAX_LINE_BYTES:
                raise ValueError(f"is longer than {MAX_LINE_BYTES // 2**20} MiB, which is the limit for one row.")
            return SourceRow(self._number, strict_json.load_object(text))
        except ValueError as error:
            return SourceRow(self._number, None, str(error))

    def _count(self, characters: int) -> None:
        """Counts characters against a limit: repeated values take little space, so a small file can expand hugely."""
        self._written += characters
        if self._written > RATIO_FROM and self._written > _MOST_REPEATED * self._read:
            reason = f"the rows are more than {_MOST_REPEATED} times as large as the file. Send them as JSON Lines."
            raise self._refuse(reason)

    def _refuse(self, reason: str) -> InvalidRows:
        return PARQUET.refuse(self._number + 1, reason)


def _name_twice(fields: Iterable[Any]) -> str | None:
    """Returns a name that two of the columns have, or two members of the records in one; None if there is none."""
    seen: set[str] = set()
    for field in fields:
        if field.name in seen:
            return str(field.name)
        seen.add(field.name)
        inner = (field.type.field(place) for place in range(field.type.num_fields))
        if twice := _name_twice(inner):
            return twice
    return None


def _plain(value: Any) -> Any:
    """Returns a value as JSON: without NaN, which marks missing values in tables, and without a record's members that
    have no value, as all records of a column have the members of each. Raises ValueError for bytes."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        raise ValueError("a value is binary, and only text is supported here. Remove its column.")  # noqa: TRY004 (one kind)
    if isinstance(value, dict):
        plain = ((key, _plain(item)) for key, item in value.items())
        return {key: item for key, item in plain if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


PARQUET = Format(name="Parquet", recognises=lambda head: head.startswith(b"PAR1"), open=ParquetParser)
