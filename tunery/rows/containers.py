"""Kinds of file that are not JSON Lines, recognised by their first bytes."""

import re

_HEAD_BYTES = 512

_DECOMPRESS = "is compressed with {kind}. Decompress it and send the JSON Lines inside."
_CONVERT = "is {kind}. Export it as JSON Lines: one JSON object a line."
_UTF8 = "is in {kind}. Save it as UTF-8."

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", _DECOMPRESS, "gzip"),
    (b"\x28\xb5\x2f\xfd", _DECOMPRESS, "zstd"),
    (b"BZh", _DECOMPRESS, "bzip2"),
    (b"\xfd7zXZ\x00", _DECOMPRESS, "xz"),
    (b"\x04\x22\x4d\x18", _DECOMPRESS, "lz4"),
    (b"7z\xbc\xaf\x27\x1c", _CONVERT, "a 7z archive"),
    (b"PAR1", _CONVERT, "a Parquet file"),
    (b"ARROW1", _CONVERT, "an Arrow file"),
    (b"\xff\xff\xff\xff", _CONVERT, "an Arrow stream"),
    (b"ORC", _CONVERT, "an ORC file"),
    (b"Obj\x01", _CONVERT, "an Avro file"),
    (b"\xd0\xcf\x11\xe0", _CONVERT, "an old Excel workbook (.xls)"),
    (b"SQLite format 3\x00", _CONVERT, "an SQLite database"),
    (b"%PDF-", _CONVERT, "a PDF document"),
    (b"\x93NUMPY", _CONVERT, "a NumPy array"),
    (b"\x89HDF", _CONVERT, "an HDF5 file"),
    (b"\xff\xfe\x00\x00", _UTF8, "UTF-32"),
    (b"\x00\x00\xfe\xff", _UTF8, "UTF-32"),
    (b"\xff\xfe", _UTF8, "UTF-16"),
    (b"\xfe\xff", _UTF8, "UTF-16"),
)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_WIDE_TEXT = re.compile(rb"[\t-~\x00]*")
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = re.compile(rb"<(?:!doctype|\?xml|html|[a-z])", re.IGNORECASE)
_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_LIST_OF_MESSAGES = re.compile(rb'\[\s*\{\s*"(?:role|content)"\s*:')


def recognise(first_line: bytes) -> str | None:
    """What the file is, and what to do about it, as the end of a sentence about it; None for what may be JSON Lines.

    `first_line`: the file's first line without a byte order mark of UTF-8, or as much of it as there is.
    """
    head = first_line[:_HEAD_BYTES]
    return _binary(head) or _text(head.lstrip(), first_line)


def _binary(head: bytes) -> str | None:
    for magic, what, kind in _MAGIC:
        if head.startswith(magic):
            return what.format(kind=kind)
    if head.startswith(_ZIP):
        return "is a zip archive, as Excel workbooks (.xlsx) are. Unpack it, or export its table as JSON Lines."
    if _PICKLE.match(head):
        return _CONVERT.format(kind="a Python pickle")
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it and send the JSON Lines inside."
    if b"\x00" not in head[:8]:
        return None
    # Text in UTF-16 or UTF-32 without a byte order mark has a NUL beside each character of its JSON.
    wide = _WIDE_TEXT.fullmatch(head[:8])
    return _UTF8.format(kind="UTF-16 or UTF-32") if wide else _CONVERT.format(kind="a binary file")


def _text(head: bytes, line: bytes) -> str | None:
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the data itself. Run 'git lfs pull' and send the file that it brings."
    if _LIST_OF_MESSAGES.match(head):
        return 'is a list of messages. Write each conversation on one line, as {"messages": [...]}.'
    if head.startswith(b"["):
        return "is a JSON array. Write each of its objects on a line of its own, without brackets and commas around."
    if _MARKUP.match(head):
        return "is a page of HTML or XML, perhaps a download's error page. Send JSON Lines: one JSON object a line."
    if head.startswith(b"{") or not head or (head.startswith(b'"') and not _is_table(line)):
        return None
    for separator, kind in ((b"\t", "tab-separated values (TSV)"), (b",", "CSV"), (b";", "CSV")):
        if separator in line:
            return f"is a table, {kind}. Write each row as a JSON object on a line of its own."
    return "does not begin with a JSON object in braces. Send JSON Lines: one JSON object a line."


def _is_table(line: bytes) -> bool:
    """Whether a line that begins with a quote is a table's header: JSON has nothing after its string."""
    return _JSON_STRING.fullmatch(line.strip()) is None
