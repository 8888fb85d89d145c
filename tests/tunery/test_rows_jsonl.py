"""JSONL as a stream: where the chunks end must make no difference."""

import bz2
import io
import json
import lzma
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.rows.errors import InvalidJSONL, InvalidRows
from tunery.rows.jsonl import MAX_LINE_BYTES
from tunery.rows.readers import HEAD_BYTES, Checker, read

START = "Expected file to have JSONL format, where every line is a valid JSON dictionary."


def check(chunks: Iterable[bytes]) -> int:
    checker = Checker()
    for chunk in chunks:
        checker.feed(chunk)
    checker.close()
    return checker.rows


def outcome(chunks: Iterable[bytes]) -> int | str:
    try:
        return check(chunks)
    except InvalidRows as error:
        return error.message


LINES = st.sampled_from(
    [
        *(b'{"a": 1}', '{"a": "é🎉\u2028"}'.encode(), b"{}\r", b"\xef\xbb\xbf{}"),
        *(b"", b"  ", b"\r", b"\xff\xfe{", b"[1]", b'{"a"'),
    ]
)


@settings(deadline=None)
@given(st.lists(LINES, max_size=6), st.booleans(), st.lists(st.integers(0, 80), max_size=8))
def test_chunk_borders_make_no_difference(lines: list[bytes], newline_at_end: bool, borders: list[int]) -> None:
    data = b"\n".join(lines) + b"\n" * newline_at_end
    places = [0, *sorted(min(border, len(data)) for border in borders), len(data)]
    chunks = [data[start:end] for start, end in pairwise(places)]

    assert b"".join(chunks) == data
    assert outcome(chunks) == outcome([data])


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(deadline=None)
@given(st.lists(st.dictionaries(TEXT, TEXT | st.integers()), min_size=1, max_size=5), st.integers(1, 9))
def test_good_files_come_out_as_they_went_in(rows: list[dict[str, str | int]], size: int) -> None:
    data = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    chunks = [data[start : start + size] for start in range(0, len(data), size)]

    assert check(chunks) == len(rows)
    assert [(row.number, row.fields) for row in read(chunks)] == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"", 1, "the file is empty"),
        (b"\n\n", 1, "the file is empty"),
        (b"\xef\xbb\xbf", 1, "the file is empty"),
        (b'{"a": 1}\n{"a": }\n', 2, "is not JSON: Expecting value (column 7)"),
        (b'{"a": 1}\n\n{"a": 1}\n', 2, "is blank"),
        (b'{"a": 1}\n"text"\n', 2, "expected a JSON object in braces, found a string"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', 2, "is not UTF-8 (byte 8)"),
        (b'{\n "a": 1\n}\n', 1, "the object does not end on this line (column 2). Write each object on a single line"),
        (b'{"a": 1}\n{"a": [', 2, "the object does not end on this line"),
        (b'{"a": "one\ntwo"}\n', 1, "a string does not end on this line (column 7)."),
        (b'{"a": "\t"}\n', 1, "a string contains a control character (column 8)."),
        (b'{"a": "\r"}\n', 1, "a string contains a control character (column 8)."),
        (b'{"a": 1}{"a": 2}\n', 1, "there is text after the JSON object (column 9)"),
        (b'{"a": 1}\r{"a": 2}\r', 1, "the object is followed by a CR without LF, the line end of old Macs. End each"),
        (b'{"a": 1},\n{"a": 2}\n', 1, "there is text after the JSON object (column 9)"),
        (b"{'a': 1}\n", 1, "is a Python literal, not JSON (column 2). Write each row with json.dumps"),
        (b'{"a": None}\n', 1, "is a Python literal"),
        (b'{"a": 1}\n{"a": True}\n', 2, "is a Python literal"),
        (b'{"a": 1}\n{"a": NaN}', 2, "NaN is not JSON"),
        (b'{"a": 1}\n{"a": "\\u0000"}', 2, "a \\u0000 escape stands for the character NUL"),
        (b"{}\n" + b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', 2, "is longer than 4 MiB"),
    ],
)
def test_the_first_wrong_line_is_named(data: bytes, line: int, reason: str) -> None:
    with pytest.raises(InvalidJSONL) as caught:
        check([data])

    assert caught.value.message.startswith(f"{START} Line {line}: {reason}")


ROW = b'{"messages": [{"role": "user", "content": "q"}]}'
PARQUET = b"PAR1\x15\x04\x15\x10\x15\x14L\x15\x02\x15\x00\x12\x00\x00"


def _zipped(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return held.getvalue()


def _tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return held.getvalue()


CONTAINERS = {
    "messages alone": (b'[{"role": "user", "content": "q"}]\n', "a list of messages"),
    "plain text": (b"Hello there\n", "does not begin with a JSON object in braces"),
    "a table with pipes": (b"prompt|completion\na, b|c\n", "a table with '|' between its columns"),
    "a table with quoted pipes": (b'"prompt" | "completion"\na|b\n', "a table with '|' between its columns"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "a page of HTML or XML"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    "bzip2": (bz2.compress(ROW), "compressed with bzip2"),
    "xz": (lzma.compress(ROW), "compressed with xz"),
    "zip": (_zipped("rows.jsonl"), "a zip archive, as Excel workbooks (.xlsx) are"),
    "empty zip": (_zipped(), "a zip archive"),
    "zip with a newline behind its mark": (b"PK\x03\x04\n\x00\x00", "a zip archive"),
    "tar": (_tarred(), "a tar archive"),
    "Arrow": (b"ARROW1\x00\x00\xff\xff\xff\xff", "an Arrow file"),
    "pickle": (pickle.dumps([{"messages": []}]), "a Python pickle"),
    "other binary": (b"\x7fELF\x02\x01\x01\x00", "a binary file"),
    "UTF-16": (ROW.decode().encode("utf-16"), "in UTF-16"),
    "UTF-16 without a mark": (ROW.decode().encode("utf-16-le"), "in UTF-16 or UTF-32"),
    "big-endian UTF-16": (ROW.decode().encode("utf-16-be"), "in UTF-16 or UTF-32"),
    "UTF-32": (ROW.decode().encode("utf-32"), "in UTF-32"),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_another_kind_of_file_is_named(name: str, size: int) -> None:
    data, kind = CONTAINERS[name]
    size = size if len(data) < 2**20 else 2**20
    with pytest.raises(InvalidJSONL) as caught:
        check(data[start : start + size] for start in range(0, len(data), size))

    be = "" if kind.startswith("does not") else "is "
    assert caught.value.message.startswith(f"{START} Line 1: the file {be}{kind}")
    with pytest.raises(InvalidJSONL) as again:
        list(read([data]))
    assert again.value.message == caught.value.message


@pytest.mark.parametrize("line", [b'"text"', b"null", b"3", b'"a \\" b"'])
def test_a_bare_value_is_no_table(line: bytes) -> None:
    assert "table" not in str(outcome([line]))


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (b"{}\r\n{}\r\n", [1, 2]),
        (b"{}\r\r\n{}\r\r\n", [1, 2]),
        (b'{"a":\r1}\n{"a":\r2}\r', [1, 2]),
        (b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}\n{}\n", [1, 2, 3]),
        (b"{}\n\xef\xbb\xbf\n", [1]),
    ],
)
def test_ends_and_marks_of_every_system(data: bytes, numbers: list[int]) -> None:
    assert [row.number for row in read([data])] == numbers
    assert check([data]) == len(numbers)


def test_a_gap_has_the_same_verdict_for_every_reader() -> None:
    data = b"{}\n\n{}\n"
    with pytest.raises(InvalidJSONL, match="Line 2: is blank"):
        list(read([data]))
    assert "Line 2: is blank" in str(outcome([data]))


def test_a_wrong_line_is_found_while_the_file_still_comes() -> None:
    checker = Checker()
    checker.feed(b'{"a": 1}\n' * HEAD_BYTES + b'{"b"')
    with pytest.raises(InvalidJSONL, match=f"Line {HEAD_BYTES + 1}"):
        checker.feed(b"}\n")


def test_memory_does_not_grow_with_the_file() -> None:
    chunk = (json.dumps({"text": "x" * 1000}) + "\n").encode() * 64
    tracemalloc.start()
    try:
        rows = check(chunk for _ in range(200))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert rows == 200 * 64
    # A tenth of the file, not a few chunks: the peak includes what other threads allocate meanwhile.
    assert peak < 200 * len(chunk) / 10


def test_blank_lines_at_the_end_are_no_rows() -> None:
    assert check([b"{}\n{}\n", b"\n", b" \r\n"]) == 2
    assert [row.number for row in read([b"{}\n\n"])] == [1]
