"""Renders plain conversations without their template, by what `tracing` has found it to write around the contents.

Most rows have the same few sequences of roles. Each is traced once; a template that cannot be traced renders all rows.
"""

from collections.abc import Callable, Sequence

from tunery.rows.messages import Example
from tunery.rows.sentinels import Json
from tunery.rows.turns import View, trained_turns, views_of

Piece = str | int
"""A text, or the number of the message whose content it is."""
Trace = Callable[[list[Json], Sequence[View]], list[list[Piece]] | None]
"""Returns the pieces of views of these messages, and of all with the same roles; None if they cannot be traced."""

_MOST_SHAPES = 4096
_MOST_FAILURES = 8
"""Sequences of roles that may fail before the first is traced; after that none is tried any more."""
_MOST_CHARACTERS = 100_000
_MOST_COPIES = 8
"""Larger conversations, and templates that write a content more often, are left to the limits of a rendering."""

_Shape = tuple[tuple[str, bool], ...]
_Pieces = dict[View, list[Piece]]


class Pieces:
    """What a template writes around the contents of plain messages, by their roles."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: dict[_Shape, _Pieces | None] = {}
        self._failures = 0

    def render(self, example: Example, given: list[Json]) -> dict[View, str] | None:
        """Returns the texts that separate the row's answers from the rest; None if the template has to render them.

        `given`: the row's messages as the template gets them.
        """
        if example.tools or self._failures >= _MOST_FAILURES:
            return None
        contents = [message["content"] for message in given]
        if not _are_plain(given, contents):
            return None
        shape = tuple([(message["role"], is_trimmed(message["content"])) for message in given])
        pieces = self._known[shape] if shape in self._known else self._find(shape, example, given)
        return None if pieces is None else {view: _fill(one, contents) for view, one in pieces.items()}

    def _find(self, shape: _Shape, example: Example, given: list[Json]) -> _Pieces | None:
        asked = views_of(trained_turns(example), len(given))
        found = self._trace(given, asked)
        pieces = dict(zip(asked, found, strict=True)) if found is not None and not _has_copies(found) else None
        if not any(self._known.values()):
            self._failures += pieces is None
        if len(self._known) >= _MOST_SHAPES:
            self._known.clear()
        self._known[shape] = pieces
        return pieces


def _are_plain(given: list[Json], contents: Sequence[str | None]) -> bool:
    """Whether every message has a role and a text that is not blank, and no more, and the texts are of usual size."""
    size = 0
    for message, content in zip(given, contents, strict=True):
        if len(message) != 2 or not content or content.isspace():
            return False
        size += len(content)
    return size <= _MOST_CHARACTERS


def is_trimmed(content: str) -> bool:
    """Whether a text that is not empty has no blanks around it."""
    return not (content[0].isspace() or content[-1].isspace())


def _has_copies(found: list[list[Piece]]) -> bool:
    numbers = [[piece for piece in pieces if not isinstance(piece, str)] for pieces in found]
    return any(some.count(one) > _MOST_COPIES for some in numbers for one in set(some))


def _fill(pieces: list[Piece], contents: Sequence[str]) -> str:
    return "".join([piece if isinstance(piece, str) else contents[piece] for piece in pieces])
