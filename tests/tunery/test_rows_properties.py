"""Properties of every reader, for any bytes: rows are preserved, line numbers agree, nothing crashes."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.encoding import read_examples
from tunery.rows.errors import InvalidRows

Row = dict[str, Any]
BOM = "\ufeff"
ENDS = st.sampled_from(["\n", "\r\n", "\r\r\n"])
QUICK = settings(deadline=None, derandomize=True, max_examples=30)


def read(data: bytes, size: int = 2**16) -> list[tuple[int, int, Row | None]]:
    """Each row's number, line and fields."""
    found = readers.read([data[start : start + size] for start in range(0, len(data), size)])
    return [(row.number, row.line or row.number, row.fields) for row in found]


# --- round trip ---

TEXT = st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=30)
CALL = st.fixed_dictionaries({"name": st.just("f"), "arguments": st.just('{"x": 1}')})
ANSWER = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}) | st.builds(
    lambda call: {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}, CALL
)
CHAT = st.builds(
    lambda asked, answer, before: {"messages": [*before, {"role": "user", "content": asked}, answer]},
    TEXT,
    ANSWER,
    st.sampled_from([[], [{"role": "system", "content": "Be brief."}]]),
)
CHATS = st.lists(CHAT, min_size=1, max_size=4)


def as_table(rows: list[Row], separator: str) -> bytes:
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=separator, lineterminator="\n")
    writer.writerow(["messages", "source"])  # a table of one column cannot be recognised
    writer.writerows([json.dumps(row["messages"]), "made"] for row in rows)
    return made.getvalue().encode()


def as_parquet(rows: list[Row]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pyarrow.table({"messages": [json.dumps(row["messages"]) for row in rows]}), made)
    return made.getvalue()


def as_nested_parquet(rows: list[Row]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), made)
    return made.getvalue()


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "JSONL": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "array": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "printed array": lambda rows: json.dumps(rows, indent=2).encode(),
    "CSV": lambda rows: as_table(rows, ","),
    "TSV": lambda rows: as_table(rows, "\t"),
    "Parquet": as_parquet,
    "nested Parquet": as_nested_parquet,
}


def examples(data: bytes) -> list[Row]:
    return [example.model_dump(include={"messages"}) for _, example in read_examples([data], "training")]


@QUICK
@given(CHATS, st.sampled_from([bytes, gzip.compress, zstd.compress]))
def test_a_chat_means_the_same_in_every_format(rows: list[Row], packed: Callable[[bytes], bytes]) -> None:
    wanted = examples(WRITERS["JSONL"](rows))
    for name, write in WRITERS.items():
        assert examples(packed(write(rows))) == wanted, name


# --- line ends and marks ---


@QUICK
@given(st.lists(ENDS, min_size=2, max_size=6), st.lists(st.booleans(), min_size=7, max_size=7), st.integers(1, 9))
def test_line_ends_and_marks_move_no_line(ends: list[str], marked: list[bool], size: int) -> None:
    """Each line has its own line ending, and may begin with a byte order mark."""
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(len(ends))]
    marks = [BOM if mark else "" for mark in marked]
    lines = [mark + json.dumps(row) + end for mark, row, end in zip(marks, rows, ends, strict=False)]
    cells = [f"{mark}{row['prompt']},a{end}" for mark, row, end in zip(marks, rows, ends, strict=False)]
    numbers, below = list(range(1, len(rows) + 1)), list(range(2, len(rows) + 2))
    table = "prompt,completion" + ends[0] + "".join(cells)
    for numbered, text in (
        (zip(numbers, numbers, rows, strict=True), "".join(lines)),
        (zip(numbers, below, rows, strict=True), "[" + ends[0] + ",".join(lines) + "]"),
        (zip(below, below, rows, strict=True), table),
        (zip(below, below, rows, strict=True), table.replace(",", "\t")),
    ):
        assert read(text.encode(), size) == list(numbered), text


# --- any bytes ---

BEGINNINGS = st.sampled_from(
    [b"", b"[", b'{"a": 1}\n', b"a,b\n", b"a\tb\n", b"PAR1", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"]
)
WHOLE = [write([{"messages": [{"role": "user", "content": "q"}]}]) for write in WRITERS.values()]
FILES = [*WHOLE, *map(gzip.compress, WHOLE), *map(zstd.compress, WHOLE)]


def _spoilt(data: bytes, place: int, piece: bytes) -> bytes:
    at = place % (len(data) + 1)
    return data[:at] + piece + data[at + len(piece) :]


SPOILT = st.builds(_spoilt, st.sampled_from(FILES), st.integers(0, 10_000), st.binary(max_size=4))


def refusal_of(data: bytes) -> InvalidRows | None:
    try:
        read(data)
    except InvalidRows as refused:
        return refused
    return None


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.builds(lambda start, rest: start + rest, BEGINNINGS, st.binary(max_size=60)) | SPOILT)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """A refusal names the row, and readers of rows and of examples come to the same verdict."""
    refusal = refusal_of(data)
    if refusal is not None:
        assert refusal.fields["line"] >= 1
        assert refusal.message.startswith("Expected file to have ")
        with pytest.raises(InvalidTrainingFile):
            list(read_examples([data], "training"))
        return
    rows = read(data)
    numbers = [number for number, _, _ in rows]
    is_table = readers.identify([data]).startswith(("CSV", "TSV"))
    assert is_table or numbers == list(range(1, len(rows) + 1))
    assert numbers == sorted({*numbers})
    assert all(line >= number for number, line, _ in rows)


@pytest.mark.slow
@settings(deadline=None, max_examples=1500)
@given(st.builds(lambda start, rest: start + rest, BEGINNINGS, st.binary(max_size=400)) | SPOILT, st.integers(1, 50))
def test_any_bytes_have_one_verdict_however_they_are_cut(data: bytes, size: int) -> None:
    def verdict(size: int) -> str:
        try:
            return str(read(data, size))
        except InvalidRows as refused:
            return refused.message.partition(" is damaged: ")[0]  # the library's messages differ

    assert verdict(size) == verdict(2**20)
