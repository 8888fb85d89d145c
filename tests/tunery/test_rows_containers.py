"""Files of every format hold the same rows, however they are compressed, joined and cut into chunks."""

import csv
import gzip
import io
import json
from itertools import accumulate
from typing import Any

import pyarrow
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunery.rows import readers
from tunery.rows.errors import InvalidRows

ROWS = [{"prompt": f'question {n}, "quoted"\nand more', "completion": "é🎉" * n} for n in range(1, 6)]
Row = dict[str, Any]


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Row], separator: str = ",", end: str = "\n") -> bytes:
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=separator, lineterminator=end)
    writer.writerows([rows[0], *(row.values() for row in rows)])
    return made.getvalue().encode()


def columns(rows: list[Row]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), made)
    return made.getvalue()


def names_twice(columns: tuple[str, ...], members: tuple[str, ...]) -> bytes:
    """A Parquet file with a row of these columns, the last of records with these members."""
    record = pyarrow.StructArray.from_arrays([pyarrow.array(["x"]) for _ in members], names=list(members))
    texts = [pyarrow.array(["x"]) for _ in columns[1:]]
    made = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays([*texts, record], names=list(columns)), made)
    return made.getvalue()


FILES = {
    "JSONL": jsonl(ROWS),
    "array": json.dumps(ROWS).encode(),
    "printed array": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(),
    "CSV": table(ROWS),
    "CSV of Windows": b"\xef\xbb\xbf" + table(ROWS, ";", "\r\n"),
    "CSV with CR twice": table(ROWS, end="\r\r\n"),
    "CSV below blank lines": b"\r\n\n" + table(ROWS),
    "CSV below its separator": b"sep=;\r\n" + table(ROWS, ";"),
    "CSV with blanks behind commas": b"prompt, completion\n" + table(ROWS).partition(b"\n")[2].replace(b'",', b'", '),
    "TSV": table(ROWS, "\t"),
    "Parquet": columns(ROWS),
    "arrays joined": json.dumps(ROWS[:2]).encode() + b"\n\xef\xbb\xbf" + json.dumps(ROWS[2:]).encode(),
    "array with two marks": b"\xef\xbb\xbf" * 2 + json.dumps(ROWS).encode(),
    "CSV with two marks": b"\xef\xbb\xbf" * 2 + table(ROWS),
    "JSONL with two marks": b"\xef\xbb\xbf" * 2 + jsonl(ROWS),
    "JSONL joined on a line": jsonl(ROWS[:2])[:-1] + b"\xef\xbb\xbf" + jsonl(ROWS[2:]),
    "JSONL joined by a mark and a line": jsonl(ROWS[:2])[:-1] + b"\xef\xbb\xbf\r\n" + jsonl(ROWS[2:]),
    "CSV joined": table(ROWS[:2]) + b"\xef\xbb\xbf" + table(ROWS[2:]),
}
PACKED = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstd.compress,
    "two streams": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
}


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def read(data: bytes, size: int = 2**16) -> list[tuple[int, Row | None]]:
    return [(row.number, row.fields) for row in readers.read(cut(data, size))]


def numbers(data: bytes) -> list[int]:
    """The rows' numbers: the lines on which an editor shows their beginnings in a table, else 1, 2, 3."""
    if readers.identify([data]) not in ("CSV", "TSV"):
        return list(range(1, len(ROWS) + 1))
    return [data[: data.index(f"question {n},".encode())].count(b"\n") + 1 for n in range(1, len(ROWS) + 1)]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FILES)
def test_rows_equal_those_of_json_lines(name: str, packed: str) -> None:
    data = PACKED[packed](FILES[name])
    for size in (1, 7, 2**20):
        assert read(data, size) == list(zip(numbers(FILES[name]), ROWS, strict=True))


@pytest.mark.parametrize("column", ["text", "messages", "conversations", "conversation"])
def test_a_single_column_may_be_a_whole_row(column: str) -> None:
    for header in (column, f'"{column}"'):
        assert read(f'{header}\n"a ""b"""\n'.encode()) == [(2, {column: 'a "b"'})]


def test_rows_that_share_a_line_have_a_number_each() -> None:
    data = '{"a": 1}\n{"a": "}\ufeff{"}\ufeff {"a": 3}\n{"a": }\n'.encode()
    rows = list(readers.read([data]))
    assert [(row.number, row.line or row.number, row.fields) for row in rows] == [
        (1, 1, {"a": 1}),
        (2, 2, {"a": "}\ufeff{"}),
        (3, 2, {"a": 3}),
        (4, 3, None),
    ]
    broken = list(readers.read(['{"a": 1}\ufeff{"a": 1} x'.encode()]))[1]
    assert "there is text after the JSON object" in str(broken.fault)


LONG = "Nein; nie.\n" * 9000
"""More than the bytes by which a format is recognised, with one comma less than the header."""


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Frage, kurz;Antwort\nWo?;Da, wo.\nWer?;Ich.\n", {"Frage, kurz": "Wo?", "Antwort": "Da, wo."}),
        ('Frage, kurz;Antwort\n"Wo,\nwann?";Da.\nWer?;Ich.\n' + LONG, {"Frage, kurz": "Wo,\nwann?", "Antwort": "Da."}),
        ('"prompt, or question";completion\nq;a\n', {"prompt, or question": "q", "completion": "a"}),
        ("prompt,completion;old\nq,a\nq,a;b\n", {"prompt": "q", "completion;old": "a"}),
        ("prompt,completion|old\nq,a\nq,a|b\n", {"prompt": "q", "completion|old": "a"}),
        ("prompt\tcompletion, in words\nq, or r\ta\n", {"prompt": "q, or r", "completion, in words": "a"}),
    ],
)
def test_of_several_signs_in_a_header_the_records_tell_which_separates(text: str, first: Row) -> None:
    for size in (1, 7, 2**20):
        assert read(text.encode(), size)[0] == (2, first)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_a_table_are_numbered_by_the_lines_on_which_they_begin(end: str) -> None:
    lines = ["", "", "sep=,", "prompt,completion", "q,a", "", '"q', "", 'q",a', "q,a", "", "prompt,completion", "q,a"]
    data = end.join(lines).encode()
    for size in (1, 7, 2**20):
        rows = list(readers.read(cut(data, size)))
        assert [(row.number, row.line, row.name) for row in rows] == [
            (5, None, "line 5"),
            (7, None, "line 7"),
            (10, None, "line 10"),
            (13, None, "line 13"),
        ]


def test_blanks_are_kept_where_the_header_has_none() -> None:
    assert read(b"prompt,completion\nq, a\n") == [(2, {"prompt": "q", "completion": " a"})]
    assert read(b"prompt, completion,id\nq, a,1\n") == [(2, {"prompt": "q", " completion": " a", "id": "1"})]


TEXT = st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=5), st.integers(1, 9), st.sampled_from(",;\t"))
def test_any_text_comes_through_every_format(texts: list[str], size: int, separator: str) -> None:
    rows = [{"prompt": text, "completion": "a"} for text in texts]
    for data in (json.dumps(rows).encode(), json.dumps(rows, indent=1).encode(), columns(rows)):
        assert read(data, size) == list(enumerate(rows, 1))
    begins = accumulate((1 + text.count("\n") for text in texts), initial=2)
    assert read(table(rows, separator), size) == list(zip(begins, rows, strict=False))


def outcome(data: bytes, size: int) -> str:
    try:
        return str([(row.number, row.fields, row.fault, row.line) for row in readers.read(cut(data, size))])
    except InvalidRows as error:
        return error.message


@pytest.mark.parametrize("beside", ["x" * 70_000, "x"])
def test_the_separator_does_not_depend_on_the_chunks(beside: str) -> None:
    """The records that could tell it, or the header's end, are behind the bytes by which a format is recognised."""
    data = f"a;b, {beside}\nq, r;s\n{'t' * 70_000};u, v, w\nx;y\n".encode()
    assert outcome(data, 7) == outcome(data, 2**20)


SIGNS = st.lists(st.sampled_from([*'[]{},:"', "\\", "\n", "\r", "a", "1", '{"a":1}', "\ufeff", " ", ";", "\t"]))


@settings(deadline=None, max_examples=150)
@given(SIGNS.map("".join), st.integers(1, 5), st.sampled_from(["[", "a,b\n", ""]))
def test_broken_file_has_one_verdict_however_chunks_end(text: str, size: int, start: str) -> None:
    data = (start + text).encode()
    assert outcome(data, size) == outcome(data, 2**20)


MIB = 2**20
DEEP = b"[" * 10_000 + b"]" * 10_000
WIDE = columns([{f"c{n}": "x" for n in range(5000)}])
BROKEN = {
    "line of 50 MB in an array": (b'[{}, {"a": "' + b"x" * 50 * MIB, "Row 2: is longer than 4 MiB"),
    "list of 50 MB in an array": (b'[{}, {"a": [' + b"null, " * 9 * MIB, "Row 2: is longer than 4 MiB"),
    "no comma before 50 MB": (b'[{}, {"a": 1 "b": "' + b"x" * 50 * MIB, "Row 2: is not JSON: Expecting ',' delimiter"),
    "value of 50 MB": (b'a,b\n"' + b"x" * 50 * MIB, "Line 2: is longer than 4 MiB"),
    "quote without end": (b'a,b\n1,2\n"' + b"x\n" * 10 * MIB, "20000 lines, which is the limit for one row."),
    "short quote without end": (b'a,b\n1,2\n"x,y\nz,w\n', "CSV format. Line 3: a quoted value has no end."),
    "quote of a TSV without end": (b'a\tb\n1\t2\n"x', "TSV format. Line 3: a quoted value has no end."),
    "nesting": (DEEP, "objects and lists are nested too deeply."),
    "nesting in a row": (b'[{"a": ' + DEEP + b"}]", "objects and lists are nested too deeply."),
    "array without end": (b'[{"a": 1},\n{"a": 2}\n', "Row 2: the array has no end: a ']' is missing."),
    "array without comma": (b'[{"a": 1}\n{"a": 2}]', "expected ',' or ']' after the row. (line 2 of the file)"),
    "array with a broken row": (b'[{"a": 1},\n\n{"a": }]', "Row 2: is not JSON: Expecting value (line 3 of the file)"),
    "text behind the array": (b"[{}] x", "there is text after the array."),
    "empty array": (b"[]", "the array is empty."),
    "array not in UTF-8": (b'[{"a": "\xff"}]', "the file is not UTF-8 (byte 9)."),
    "CSV with the line ends of old Macs": (
        b"a,b\r1,2\r3,4\r",
        "Line 1: the header is followed by a CR without LF, the",
    ),
    "TSV with the line ends of old Macs": (b"a\tb\r1\t2\r", "Line 1: the header is followed by a CR without LF, the"),
    "long CSV with the line ends of old Macs": (
        b"a,b\r" + b"1,2\r" * 2 * MIB,
        "Line 1: the header is followed by a CR without LF, the line end of old Macs. End each line with LF or CRLF.",
    ),
    "header alone": (b"a,b\n", "Line 2: the file has a header but no rows."),
    "pipes beside a comma": (b"a|b, c\nx|y\nx|y, z\nx|y\n", "Line 1: the file is a table with '|' between"),
    "pipes beside a quoted comma": (b'"a, b"|"c"\nx|y\n', "Line 1: the file is a table with '|' between its"),
    "header twice": (b"a,a\n1,2\n", "Line 1: two columns have the name 'a'."),
    "wide table": (b",".join(b"c%d" % n for n in range(5000)) + b"\n", "Line 1: the table has 5000 columns, more than"),
    "CSV not in UTF-8": (b"a,b\n1,2\n\xff,3\n", "Line 3: is not UTF-8. Save the file as UTF-8."),
    "CSV record not in UTF-8": (b'a,b\n1,2\n"x\n\xff",3\n', "Line 4: is not UTF-8. Save the file as UTF-8."),
    "second row of an array not in UTF-8": (
        b'[{"a": 1},\n{"a": "\xff"}]',
        "Row 2: the file is not UTF-8 (byte 19). Save it as UTF-8. (line 2 of the file)",
    ),
    "NUL bytes": (b"\0" * 99, "Line 1: the file begins with NUL bytes alone"),
    "NUL bytes in gzip": (gzip.compress(b"\0" * 99), "Line 1: the file begins with NUL bytes alone"),
    "UTF-16": ("{}".encode("utf-16-le"), "the file is in UTF-16 or UTF-32."),
    "wide Parquet": (WIDE, "the table has 5000 columns, more than 1000."),
    "Parquet with a column twice": (
        names_twice(("prompt", "completion", "completion"), ("content",)),
        "Row 1: two columns have the name 'completion'. Rename one of them.",
    ),
    "Parquet with a member twice": (
        names_twice(("messages",), ("role", "content", "content")),
        "Row 1: two columns have the name 'content'. Rename one of them.",
    ),
    "cut Parquet": (FILES["Parquet"][:-5], "the file is damaged or incomplete"),
    "cut gzip": (gzip.compress(jsonl(ROWS))[:-9], "is incomplete."),
    "damaged gzip": (b"\x1f\x8b\x08\x00" + b"x" * 50, "gzip format. Row 1: the file is damaged"),
    "gzip and more": (gzip.compress(b"{}\n") + b"{}", "is followed by uncompressed data."),
    "gzip twice": (gzip.compress(gzip.compress(b"{}\n")), "the file is compressed with gzip twice."),
    "gzip of nothing": (gzip.compress(b""), "the file is empty."),
    "gzip bomb": (gzip.compress(b"\0" * 200 * MIB), "Line 1: the file begins with NUL bytes alone"),
    "bomb of blanks": (gzip.compress(b"[" + b" " * 100 * MIB), "expands to more than 200 times its size."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_with_its_place(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(InvalidRows) as refused:
        read(data)
    assert reason in refused.value.message


FAULTY = {
    "key twice in an array": (b'[{"a": 1},\n{"a": [{"b": 1, "b": 2}]}]', [(2, 'has the key "b" twice. Keep one', 2)]),
    "key twice in a line": (b'{"a": 1}\n{"a": 1, "a": 1}\n', [(2, 'has the key "a" twice. Keep one of them', None)]),
    "numbers for rows": (b'[1,\n{"a": NaN}]', [(1, "expected a JSON object", 1), (2, "NaN is not JSON", 2)]),
    "half a pair": (b'[{"a": "\\ud800"}]', [(1, "half a surrogate pair", 1)]),
    "NUL": (b"a,b\nx\0,y\n", [(2, "the character NUL", None)]),
    "values too many": (b'a,b\n"x\ny",1\n1,2,3\n', [(4, "has 3 values, but the header has 2 columns", None)]),
    "text behind a quote": (b'a,b\n"x"y,2\n', [(2, "there is text after a value's closing quote", None)]),
}


@pytest.mark.parametrize("name", FAULTY)
def test_fault_of_a_row_names_it_and_its_line(name: str) -> None:
    data, faults = FAULTY[name]
    found = [(row.number, row.fault, row.line) for row in readers.read([data]) if row.fault]
    assert [(number, line) for number, _, line in found] == [(number, line) for number, _, line in faults]
    assert all(reason in fault for (_, fault, _), (_, reason, _) in zip(found, faults, strict=True))


def test_missing_values_of_tables_are_absent() -> None:
    assert read(b"prompt,system,completion\nq,,a\n") == [(2, {"prompt": "q", "system": None, "completion": "a"})]
    assert read(columns([{"a": "x", "score": float("nan")}])) == [(1, {"a": "x", "score": None})]


@pytest.mark.parametrize("header", ["text", '"text"', "\ufefftext\r"])
def test_table_of_texts_alone_needs_no_separator(header: str) -> None:
    data = f'{header}\nOnce, long ago.\n"Two, with\na break"\n'.encode()
    assert readers.identify([data]) == "CSV"
    found = list(readers.read([data]))
    assert "has 2 values" in str(found[0].fault)
    assert found[1].fields == {"text": "Two, with\na break"}
    with pytest.raises(InvalidRows):
        list(readers.read([b"body\nOnce\n"]))
