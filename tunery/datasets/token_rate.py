"""Measures how many tokens per byte a base's tokenizer makes of answers, from a file's first rows."""

import logging
from collections.abc import Iterable, Mapping
from itertools import islice

from tunery.datasets.report.rows import of_example
from tunery.datasets.report.verdict import ANY_METHOD
from tunery.failures import InvalidTrainingFile
from tunery.rows import readers
from tunery.rows.errors import InvalidRows
from tunery.rows.shapes import FileShape
from tunery.rows.template import ChatTemplate

log = logging.getLogger(__name__)

ROWS, CHARACTERS = 64, 2**17
"""The most that is read of a file: a second's work at the worst."""
_UNCUT = 2**24


def measure(chunks: Iterable[bytes], template: ChatTemplate, columns: Mapping[str, str] | None = None) -> float | None:
    """Learned tokens for each byte of an answer, stop tokens among them; None where no row can be read.

    `columns`: see `FileShape`.
    """
    try:
        return _measure(chunks, template, FileShape(columns))
    except InvalidRows as error:
        log.info("no tokens are counted: %s", error.message)
        return None


def _measure(chunks: Iterable[bytes], template: ChatTemplate, shape: FileShape) -> float | None:
    tokens, size, left = 0, 0, CHARACTERS
    for source in islice(readers.read(chunks), ROWS):
        try:
            example = ANY_METHOD.parse(source._replace(shape=shape), "training")
            row = of_example(source.number, example)
            left -= row.size
            if left < 0 and size:
                break
            encoded = ANY_METHOD.encode(template, example, source.name, max_length=_UNCUT, role="training")
        except InvalidTrainingFile:  # the report names it
            continue
        tokens += encoded.trained_tokens
        size += row.learned_bytes
    return tokens / size if tokens and size else None
