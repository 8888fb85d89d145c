"""JSONL as a stream: where the chunks end must make no difference."""

import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.errors import InvalidJSONL
from tunery.rows.jsonl import MAX_LINE_BYTES, JsonlChecker, iter_lines

START = "Expected file to have JSONL format, where every line is a valid JSON dictionary."


def check(chunks: Iterable[bytes]) -> int:
    checker = JsonlChecker()
    for chunk in chunks:
        checker.feed(chunk)
    checker.close()
    return checker.rows


def outcome(chunks: Iterable[bytes]) -> int | str:
    try:
        return check(chunks)
    except InvalidJSONL as error:
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
    assert [(number, json.loads(text)) for number, text in iter_lines(chunks)] == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"", 1, "the file is empty"),
        (b"\n\n", 1, "the file is empty"),
        (b"\xef\xbb\xbf", 1, "the file is empty"),
        (b'{"a": 1}\n{"a": }\n', 2, "Expecting value (column 7)"),
        (b'{"a": 1}\n\n{"a": 1}\n', 2, "is blank"),
        (b'{"a": 1}\n"text"\n', 2, "expected a JSON object in braces, found a string"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', 2, "is not UTF-8 (byte 8)"),
        ('{"a": 1}\n'.encode("utf-16"), 1, "the file is in UTF-16"),
        (b"prompt,completion\na,b\n", 1, "Expecting value"),
        (b'{\n "a": 1\n}\n', 1, "Expecting property name"),
        (b'{"a": 1}{"a": 2}\n', 1, "Extra data"),
        (b'{"a": 1}\n{"a": NaN}', 2, "NaN is not JSON"),
        (b'{"a": 1}\n{"a": "\\u0000"}', 2, "a \\u0000 escape stands for the character NUL"),
        (b"{}\n" + b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', 2, "is longer than 4 MiB"),
    ],
)
def test_the_first_wrong_line_is_named(data: bytes, line: int, reason: str) -> None:
    with pytest.raises(InvalidJSONL) as caught:
        check([data])

    assert caught.value.message.startswith(f"{START} Line {line}: {reason}")


def test_a_wrong_line_is_found_while_the_file_still_comes() -> None:
    checker = JsonlChecker()
    checker.feed(b'{"a": 1}\n{"b"')
    with pytest.raises(InvalidJSONL, match="Line 2"):
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
    assert peak < 10 * len(chunk) < 200 * len(chunk) / 10


def test_blank_lines_at_the_end_are_no_rows() -> None:
    assert check([b"{}\n{}\n", b"\n", b" \r\n"]) == 2
    assert [number for number, _ in iter_lines([b"{}\n\n"])] == [1]
