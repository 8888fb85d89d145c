"""Reads multipart forms in constant memory: text fields are kept, the file is streamed.

Why not the framework's own forms: they spool the whole file to a temporary file before a route sees its first byte,
and would take any number of bytes to say that it is one too many.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from pydantic import BaseModel, ValidationError

from api import middleware
from tunery.errors import InvalidValue, TooLarge

CHUNK = 2**20
"""The file is passed on in pieces of about this size: a hop to another thread for each network packet costs more."""
F = TypeVar("F", bound=BaseModel)
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 64 * 2**10
_OVERHEAD = 2**20
"""Maximum bytes of a form beside its file: boundaries, headers, text fields."""


@dataclass
class Form:
    """What came in so far: the text fields, the file's name and how many of its bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    bytes: int = 0


Take = Callable[[Form, bytes], None]
"""Receives the file's next bytes, in a thread. An exception refuses the form."""


async def receive(request: Request, *, file_field: str, limit: int, what: str, instead: str, take: Take) -> Form:
    """Reads the form to its end. Raises TooLarge beyond `limit` bytes of file, InvalidValue for a broken form."""
    too_large = TooLarge(what=what, limit=limit, instead=instead, param=file_field)
    if int(request.headers.get("content-length", 0)) > limit + _OVERHEAD:
        raise too_large
    middleware.allow(request, limit + _OVERHEAD)
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
    """Returns the text fields as a model; `a[b]` is the field b of a. Raises RequestValidationError.

    An empty field counts as absent: that is how browsers send what nobody filled in.
    """
    nested: dict[str, Any] = {}
    for name, value in form.fields.items():
        if value:
            _nest(nested, name, value)
    _check_nested(nested, kind)
    try:
        return kind.model_validate(nested)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise RequestValidationError(faults, body=nested) from None


def _check_nested(nested: Mapping[str, Any], kind: type[BaseModel]) -> None:
    """Raises InvalidValue for an object that is one text, such as its JSON: in a form each value is a field."""
    for name, expected in kind.model_fields.items():
        parts = [f"'{name}[{part}]'" for part in _values_of(expected.annotation)]
        if parts and isinstance(nested.get(name), str):
            raise InvalidValue(param=name, reason=f"Send '{name}' as form fields of its own: {' and '.join(parts)}.")


def _values_of(annotation: Any) -> list[str]:
    """Returns the names of the values that an object has; none for a plain field."""
    kinds = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return [name for each in kinds if issubclass(each, BaseModel) for name in each.model_fields]


def _nest(nested: dict[str, Any], name: str, value: str) -> None:
    outer, bracket, inner = name.partition("[")
    is_inner = bool(bracket) and inner.endswith("]")
    if isinstance(nested.get(outer), str if is_inner else dict):
        raise InvalidValue(param=outer, reason=f"The form has both '{outer}' and '{outer}[...]'. Send only the second.")
    if is_inner:
        nested.setdefault(outer, {})[inner[:-1]] = value
    else:
        nested[name] = value


class _Reader:
    """Sorts what the parser finds: text fields into the form, the file's bytes into `waiting`."""

    def __init__(self, content_type: str, form: Form, file_field: str) -> None:
        self.waiting = bytearray()
        self._form, self._file_field = form, file_field
        self._name, self._value, self._is_file = "", bytearray(), False
        kind, options = parse_options_header(content_type)
        if kind != "multipart/form-data" or "boundary" not in options:
            raise InvalidValue(param=file_field, reason="Send a form: 'Content-Type: multipart/form-data'.")
        with _naming_faults():
            # Every byte is a character of latin-1: a name in another coding is no reason to refuse the file.
            self._parser = PushMultipartParser(options["boundary"], header_charset="latin-1")

    def write(self, packet: bytes) -> None:
        """The form's next bytes; none end it."""
        if not packet:
            return
        with _naming_faults():
            for event in self._parser.parse(packet):
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                elif event is None:
                    self._end()
                else:
                    self._take(event)

    def next(self) -> bytes:
        """Returns the file's bytes that came since the last call."""
        data = bytes(self.waiting)
        self.waiting.clear()
        return data

    def check_whole(self) -> None:
        """Raises InvalidValue for a form that was cut off or has no file."""
        try:
            self._parser.close()
        except MultipartError:
            raise InvalidValue(
                reason="The multipart form ends before its closing boundary: the request was cut off. Send it again."
            ) from None
        if self._form.filename is None:
            raise InvalidValue(param=self._file_field, reason=f"Missing required parameter: '{self._file_field}'.")

    def _begin(self, part: MultipartSegment) -> None:
        self._name, self._value = _text(part.name), bytearray()
        self._is_file = self._name == self._file_field
        if not self._is_file:
            self._check_field(part)
            return
        if self._form.filename is not None:
            raise InvalidValue(param=self._file_field, reason="The form has two files. Send one file per request.")
        self._form.filename = _text(part.filename) or "upload"

    def _check_field(self, part: MultipartSegment) -> None:
        if part.filename is not None:
            raise InvalidValue(
                param=self._name, reason=f"Unknown file field '{self._name}'. Send the file as '{self._file_field}'."
            )
        if self._name in self._form.fields:
            raise InvalidValue(param=self._name, reason=f"The form has '{self._name}' twice. Send it once.")
        if len(self._form.fields) >= _MAX_FIELDS:
            raise InvalidValue(reason=f"The form has more than {_MAX_FIELDS} fields.")

    def _take(self, data: bytes) -> None:
        if self._is_file:
            self.waiting += data
            self._form.bytes += len(data)
            return
        self._value += data
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidValue(param=self._name, reason=f"'{self._name}' is longer than {_MAX_FIELD_BYTES} bytes.")

    def _end(self) -> None:
        if not self._is_file:
            self._form.fields[self._name] = self._value.decode(errors="replace")


def _text(header: str | None) -> str:
    return (header or "").encode("latin-1").decode(errors="replace")


@contextmanager
def _naming_faults() -> Iterator[None]:
    try:
        yield
    except MultipartError as error:
        raise InvalidValue(reason=f"The form's multipart encoding is invalid ({error}). Send it again.") from None
