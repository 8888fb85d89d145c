"""Multipart forms in constant memory: text fields are kept, the one file streams through.

Why not the framework's own forms: they spool the whole file to a temporary file before a route sees its first byte,
and would take any number of bytes to say that it is one too many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api import edge
from tunery.errors import InvalidValue, TooLarge

CHUNK = 2**20
"""The file is passed on in pieces of about this size: a hop to another thread for each network packet costs more."""
F = TypeVar("F", bound=BaseModel)
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 64 * 2**10
_OVERHEAD = 2**20
"""What a form may add to its file: boundaries, headers, text fields."""


@dataclass
class Form:
    """What came in so far: the text fields, the file's name and how many of its bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    bytes: int = 0


Take = Callable[[Form, bytes], None]
"""Gets the file's next bytes, in a thread. What it raises refuses the form."""


async def receive(request: Request, *, file_field: str, limit: int, what: str, instead: str, take: Take) -> Form:
    """Reads the form to its end. Raises TooLarge beyond `limit` bytes of file, InvalidValue for a broken form."""
    too_large = TooLarge(what=what, limit=limit, instead=instead, param=file_field)
    if int(request.headers.get("content-length", 0)) > limit + _OVERHEAD:
        raise too_large
    edge.allow(request, limit + _OVERHEAD)
    form = Form()
    reader = _Reader(request.headers.get("content-type", ""), form, file_field)
    async for packet in request.stream():
        reader.write(packet)
        if form.bytes > limit:
            raise too_large
        if len(reader.waiting) >= CHUNK:
            await run_in_threadpool(take, form, reader.next())
    if reader.waiting:
        await run_in_threadpool(take, form, reader.next())
    reader.check_whole()
    return form


def parse_fields(form: Form, kind: type[F]) -> F:
    """The text fields as a model; `a[b]` is the field b of a. Raises RequestValidationError.

    An empty field counts as absent: that is how browsers send what nobody filled in.
    """
    nested: dict[str, Any] = {}
    for name, value in form.fields.items():
        if value:
            _nest(nested, name, value)
    try:
        return kind.model_validate(nested)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults, body=nested) from None


def _nest(nested: dict[str, Any], name: str, value: str) -> None:
    outer, bracket, inner = name.partition("[")
    is_inner = bool(bracket) and inner.endswith("]")
    if isinstance(nested.get(outer), str if is_inner else dict):
        raise InvalidValue(param=outer, reason=f"The form has both '{outer}' and '{outer}[...]'. Send the second only.")
    if is_inner:
        nested.setdefault(outer, {})[inner[:-1]] = value
    else:
        nested[name] = value


class _Reader:
    """python-multipart's low-level parser, and what its callbacks have found."""

    def __init__(self, content_type: str, form: Form, file_field: str) -> None:
        self.waiting = bytearray()
        self._form, self._file_field = form, file_field
        self._ended = False
        self._header, self._headers = b"", {b"": b""}
        self._name, self._value, self._is_file = "", bytearray(), False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidValue(param=file_field, reason="Send a form: 'Content-Type: multipart/form-data'.")
        with _naming_faults():
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def write(self, packet: bytes) -> None:
        with _naming_faults():
            self._parser.write(packet)

    def next(self) -> bytes:
        """The file's bytes that came since the last call."""
        data = bytes(self.waiting)
        self.waiting.clear()
        return data

    def check_whole(self) -> None:
        """Raises InvalidValue for a form that was cut off (the parser itself does not mind) or has no file."""
        if not self._ended:
            raise InvalidValue(
                reason="The form ends before its closing boundary: the request was cut off. Send it again."
            )
        if self._form.filename is None:
            raise InvalidValue(param=self._file_field, reason=f"Missing required parameter: '{self._file_field}'.")

    def _on_part_begin(self) -> None:
        self._headers, self._header, self._value = {}, b"", bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        # A header's value follows its name; a name after a value begins the next header.
        if self._header in self._headers:
            self._header = b""
        self._header += data[start:end].lower()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers[self._header] = self._headers.get(self._header, b"") + data[start:end]

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == self._file_field
        if not self._is_file:
            return self._check_field(options)
        if self._form.filename is not None:
            raise InvalidValue(param=self._file_field, reason="The form has two files. Send one file a request.")
        self._form.filename = options.get(b"filename", b"upload").decode(errors="replace") or "upload"
        return None

    def _check_field(self, options: dict[bytes, bytes]) -> None:
        if b"filename" in options:
            raise InvalidValue(
                param=self._name, reason=f"Unknown file '{self._name}': the file's field is '{self._file_field}'."
            )
        if self._name in self._form.fields:
            raise InvalidValue(param=self._name, reason=f"The form has '{self._name}' twice. Send it once.")
        if len(self._form.fields) >= _MAX_FIELDS:
            raise InvalidValue(reason=f"The form has more than {_MAX_FIELDS} fields.")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.waiting += data[start:end]
            self._form.bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidValue(param=self._name, reason=f"'{self._name}' is longer than {_MAX_FIELD_BYTES} bytes.")

    def _on_part_end(self) -> None:
        if not self._is_file:
            self._form.fields[self._name] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self._ended = True


@contextmanager
def _naming_faults() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise InvalidValue(reason=f"The form's multipart coding is broken ({error}). Send it again.") from None
