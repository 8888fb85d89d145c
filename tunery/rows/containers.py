"""Recognises unsupported kinds of file by their first bytes."""

import re

BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 512

_DECOMPRESS = "is compressed with {kind}. Decompress it, or compress it with gzip or zstd."
_AGAIN = "is compressed with {kind} twice. Decompress it once."
_CONVERT = "is {kind}. Export it as JSON Lines, CSV or Parquet."
_UTF8 = "is in {kind}. Save it as UTF-8."

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", _AGAIN, "gzip"),
    (b"\x28\xb5\x2f\xfd", _AGAIN, "zstd"),
    (b"BZh", _DECOMPRESS, "bzip2"),
    (b"\xfd7zXZ\x00", _DECOMPRESS, "xz"),
    (b"\x04\x22\x4d\x18", _DECOMPRESS, "lz4"),
    (b"7z\xbc\xaf\x27\x1c", _CONVERT, "a 7z archive"),
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
_ALONE = frozenset({b"text", b"messages", b"conversations", b"conversation"})
"""Headers of a one-column table, which has no separator, that are a whole row without `columns`."""
_PIPES = re.compile(rb'[^\t,;{\[<]*\w"?[ ]*\|[ ]*"?\w[^\t,;]*')
_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_LIST_OF_MESSAGES = re.compile(rb'\[\s*\{\s*"(?:role|content)"\s*:')


def unmark(data: bytes) -> bytes:
    """Returns data without the byte order marks before it; joined files may have several."""
    while data.startswith(BOM):
        data = data.removeprefix(BOM)
    return data


def recognise(first_line: bytes) -> str | None:
    """Returns what the file is and what to do about it, as the end of a sentence; None for what may be JSON Lines.

    `first_line`: the file's first line without UTF-8's byte order marks, or as much of it as there is.
    """
    head = first_line[:_HEAD_BYTES]
    return _binary(head) or _text(head.lstrip())


def separator(first_line: bytes) -> str | None:
    """Returns the column separator of a table with this header line; None if it is not a table."""
    head = first_line.lstrip()
    if recognise(first_line) not in (None, _NO_ROWS) or head.startswith((b"{", b"[")):
        return None
    if head.strip().strip(b'"') in _ALONE:
        return ","
    if head.startswith(b'"') and _JSON_STRING.fullmatch(head.strip()):  # a bare value of JSON
        return None
    return next((sign for sign in "\t,;" if sign.encode() in first_line), None)


def is_list_of_messages(head: bytes) -> bool:
    """Whether the array is one conversation and not a list of rows."""
    return _LIST_OF_MESSAGES.match(head) is not None


def _binary(head: bytes) -> str | None:
    for magic, what, kind in _MAGIC:
        if head.startswith(magic):
            return what.format(kind=kind)
    if head.startswith(_ZIP):
        return "is a zip archive, as Excel workbooks (.xlsx) are. Unpack it, or export its table as CSV."
    if _PICKLE.match(head):
        return _CONVERT.format(kind="a Python pickle")
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it and send the file inside."
    if b"\x00" not in head[:8]:
        return None
    if not head.strip(b"\x00"):
        return "begins with NUL bytes alone, as one does that was not copied to its end. Send it again."
    # Text in UTF-16 or UTF-32 without a byte order mark has a NUL beside each character of its JSON.
    wide = _WIDE_TEXT.fullmatch(head[:8])
    return _UTF8.format(kind="UTF-16 or UTF-32") if wide else _CONVERT.format(kind="a binary file")


SEPARATED_BY_PIPES = (
    "is a table with '|' between its columns. Separate them with commas, semicolons or tabs, and quote "
    "values that contain them."
)
_NO_ROWS = "does not begin with a JSON object in braces. Send JSON Lines, a JSON array, CSV or Parquet."


def _text(head: bytes) -> str | None:
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the data itself. Run 'git lfs pull' and send the downloaded file."
    if is_list_of_messages(head):
        return 'is a list of messages. Write each conversation as {"messages": [...]}.'
    if _MARKUP.match(head):
        return "is a page of HTML or XML, perhaps a download's error page. Send the rows themselves."
    if _PIPES.fullmatch(head):
        return SEPARATED_BY_PIPES
    return None if not head or head.startswith((b"{", b'"', b"[")) else _NO_ROWS
